"""Clients of the Redis server of jobs and keys. All stores open them here, and report the same errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from prompts_store import BadStoreUrl, redis_connection
from server.errors import DiskFull, Unavailable


def connect(url: str) -> redis.Redis:
    """A client whose answers are text. Does not connect yet. Raises ValueError for a URL of another form."""
    try:
        return redis_connection.connect(url, text=True)
    except BadStoreUrl as error:
        raise ValueError(error.detail) from None


@contextmanager
def answering(store: str) -> Iterator[None]:
    """Translate the errors of the server and its connection into a ServiceError that names neither host nor password.

    `store` is the name of the store in the message ("job store"). Raises DiskFull or Unavailable (store_unavailable).
    """
    try:
        yield
    except redis.exceptions.OutOfMemoryError:
        raise DiskFull(f"the Redis {store} is out of memory, and its policy frees none") from None
    except (redis.exceptions.RedisError, OSError) as error:
        raise Unavailable(redis_connection.failure(store, error), code="store_unavailable") from None
