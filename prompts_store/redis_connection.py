"""How a Redis server is reached, for whoever keeps something there: opened alike, and refused alike."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from prompts_store.errors import BadStoreUrl

TIMEOUT_S: Final = 5.0


def connect(url: str, *, text: bool = False) -> redis.Redis:
    """A client, whose answers are bytes or `text`. Connects nothing yet. Raises BadStoreUrl."""
    with suppress(ValueError, TypeError):
        client = redis.Redis.from_url(
            url,
            decode_responses=text,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )
        client.connection_pool.make_connection()  # connects nothing, but refuses unknown options of the URL
        return client
    # What from_url says quotes pieces of the URL, which may be pieces of the password: it is not even chained.
    raise BadStoreUrl("expected redis://[[user]:password@]host[:port][/database], got another form")
