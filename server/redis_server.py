"""The way to the Redis server that jobs and keys share: opened alike, and failing alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from server.errors import DiskFull, Unavailable

TIMEOUT_S: Final = 5.0


def connect(url: str) -> redis.Redis:
    """A client that answers in text. Connects nothing yet. Raises ValueError for a URL of another form."""
    with suppress(ValueError, TypeError):
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )
        client.connection_pool.make_connection()  # connects nothing, but refuses unknown options of the URL
        return client
    # What from_url says quotes pieces of the URL, which may be pieces of the password: it is not even chained.
    raise ValueError("expected redis://[[user]:password@]host[:port][/database], got another form")


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
