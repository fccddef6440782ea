"""The key store's contract, which `tests/keys/test_key_store.py` holds every backend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from server.errors import Conflict, NotFound

from .key import Key
from .session import Session

Keys = list[Key]  # inside the store `list` is a verb
Sessions = list[Session]


class KeyStore(Protocol):
    """Safe for threads and processes; a change is whole and durable on return. Revoked keys stay, so that a server that
    had keys never becomes open again. Raises `Unavailable` (store_unavailable) or `DiskFull` when it fails."""

    def add(self, key: Key) -> None:
        """Raises `Conflict` key_exists."""

    def change(self, key_id: str, become: Callable[[Key], Key]) -> Key:
        """Replace the key by `become(key)` atomically and return it. `become` may be called several times. Raises
        `NotFound` key_not_found."""

    def list(self) -> Keys:
        """Return all keys, oldest first."""

    def sessions(self) -> Sessions:
        """Return all sessions, in any order."""

    def start_session(self, session: Session, now: float) -> None:
        """Add a session, and remove those of `session.to_end`."""

    def end_session(self, digest: str) -> None:
        """Remove a session, if it is there."""

    def close(self) -> None: ...


def in_order(keys: Keys) -> Keys:
    return sorted(keys, key=lambda key: (key.created_at, key.id))


def exists(key_id: str) -> Conflict:
    return Conflict(f"there is a key {key_id!r} already", code="key_exists")


def unknown(key_id: str) -> NotFound:
    return NotFound(f"there is no key {key_id[:64]!r}", code="key_not_found")
