"""Opens a connection to Redis with the same timeouts, retries and errors for every user of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from prompts_store.errors import BadStoreUrl

TIMEOUT_S: Final = 5.0


def connect(url: str, *, text: bool = False) -> redis.Redis:
    """Return a client that has not connected yet; replies are bytes, or str with `text`. Raises BadStoreUrl."""
    with suppress(ValueError, TypeError):
        client = redis.Redis.from_url(
            url,
            decode_responses=text,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )
        client.connection_pool.make_connection()  # does not connect, but refuses unknown options of the URL
        return client
    # The message of from_url quotes parts of the URL, which may hold the password: the error is not even chained.
    raise BadStoreUrl("expected redis://[[user]:password@]host[:port][/database], got another form")
