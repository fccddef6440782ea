"""From a URL to a key store."""

from __future__ import annotations

from pathlib import Path

from .store import KeyStore


def open_keys(url: str) -> KeyStore:
    """Return the store of `sqlite://FILE`, `redis://…` or `rediss://…`. Connects to nothing yet. Raises ValueError."""
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and rest:
        from .sqlite_store import SqliteKeyStore

        return SqliteKeyStore(Path(rest))
    if scheme in ("redis", "rediss") and separator:
        from .redis_store import RedisKeyStore

        return RedisKeyStore(url)
    got = f"{scheme}://…" if separator else "another form"  # a URL may hold a password
    raise ValueError(f"LENSRACK_KEYS: expected sqlite://FILE or redis://…, got {got}")
