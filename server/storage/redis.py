"""The way to the Redis server that jobs and keys share: opened alike, and failing alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from prompts_store import BadStoreUrl, redis_connection
from server.errors import DiskFull, Unavailable


def connect(url: str) -> redis.Redis:
    """A client that answers in text. Connects nothing yet. Raises ValueError for a URL of another form."""
    try:
        return redis_connection.connect(url, text=True)
    except BadStoreUrl as error:
        raise ValueError(error.detail) from None


@contextmanager
def answering(store: str) -> Iterator[None]:
    """Whatever the server or the way to it does, as a ServiceError that names neither host nor password.

    `store` is what is kept there ("job store"). Raises DiskFull or Unavailable (store_unavailable).
    """
    try:
        yield
    except redis.exceptions.OutOfMemoryError:
        raise DiskFull(f"the Redis {store} is out of memory") from None
    except (redis.exceptions.RedisError, OSError) as error:
        raise Unavailable(
            f"the Redis {store} did not answer ({type(error).__name__})", code="store_unavailable"
        ) from None
