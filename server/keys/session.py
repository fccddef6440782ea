"""A browser's session: a random secret in its cookie stands for a key, until its end or a sign-out.

Only the secret's digest is stored. The session holds what proved the key, so that it ends with a rotation as well.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

SESSION_S: Final = 12 * 3600.0
MOST: Final = 100  # sessions of one key; a new one ends the oldest


@dataclass(frozen=True)
class Session:
    """`digest`: of the secret. `proof`: the hash that the token matched, or the digest of a token in the keys file.
    `ends_at`: seconds since the epoch."""

    digest: str
    key: str
    proof: str
    ends_at: float


def new_secret() -> str:
    return f"lrs_{secrets.token_urlsafe(32)}"


def digest_of(secret: str) -> str:
    """Return a digest under which a secret of 256 random bits may be stored."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def to_end(sessions: Iterable[Session], new: Session, now: float) -> list[Session]:
    """Return the sessions that end where `new` begins: those whose time is up, and of its key all but the newest."""
    mine = sorted((s for s in sessions if s.key == new.key), key=lambda s: s.ends_at)
    over = mine[: max(0, len(mine) + 1 - MOST)]
    return [*over, *(s for s in sessions if s.ends_at <= now and s not in over)]
