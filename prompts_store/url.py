"""Opens a store by its URL."""

from __future__ import annotations

from pathlib import Path

from prompts_store.errors import BadStoreUrl, excerpt
from prompts_store.store import Store


def open_store(url: str) -> Store:
    """Return the store at `file://DIR` (absolute or relative), `redis://…`, `rediss://…` (TLS) or `memory://`.

    Raises BadStoreUrl. It does not connect yet: when a Redis server is down, the first call raises StoreUnavailable.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "memory" and separator:
        from prompts_store.memory_store import MemoryStore

        return MemoryStore()
    if scheme == "file" and rest:
        from prompts_store.file_store import FileStore

        return FileStore(Path(rest))
    if scheme in ("redis", "rediss") and separator:
        from prompts_store.redis_store import RedisStore

        return RedisStore(url)
    # Only a scheme may be quoted: the rest of a mistyped URL may hold a password.
    got = excerpt(scheme) if separator and scheme.isalnum() else "another scheme"
    raise BadStoreUrl(f"expected file://DIR, redis://…, rediss://… or memory://, got {got}")
