"""Opens a connection to Redis with the same timeouts, retries and errors for every user of it."""

from __future__ import annotations

import re
from contextlib import closing, suppress
from typing import Final
from urllib.parse import urlsplit

import redis
from redis import exceptions
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from prompts_store.errors import BadStoreUrl

TIMEOUT_S: Final = 5.0

# What Redis answers, as redis-py's class and the server's text, and why no repetition of the call helps.
_REFUSALS: Final = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"AuthenticationError.*(required|already authenticated)|NOAUTH", "it requires a password"),
        (r"without any password|no password is set", "it has no password, and got one"),
        (r"Authentication\w*Error|WRONGPASS", "it does not accept the user or the password"),
        (
            r"NoPermissionError|NOPERM|ACL failure|user executing the script can't",
            "its access list forbids the user a command, key or channel that is needed",
        ),
        (
            r"(Moved|Ask|ClusterCrossSlot|ClusterDown)Error|CROSSSLOT|CLUSTERDOWN|cluster mode",
            "it is part of a cluster, expected a single server",
        ),
        (r"ReadOnlyError|READONLY", "it is a replica that takes no writes, expected its primary"),
        (r"OutOfMemoryError|\bOOM\b", "it is out of memory (its maxmemory), and its policy frees none"),
        (r"DB index|DB number", "it has no database of this number"),
        (r"DENIED|protected mode", "it runs in protected mode and has no password, so it serves its own machine only"),
        (r"MISCONF", "it cannot save to its disk, and takes no writes until it can"),
        (r"WRONGTYPE", "another program's data is under the keys, expected a database of its own"),
        (r"unknown command", "it lacks a command that is needed, expected Redis 6.2 or newer"),
        (r"CERTIFICATE_VERIFY_FAILED", "its certificate is not trusted"),
        (r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|record layer failure", "it does not speak TLS, expected redis://"),
    )
)
# Writes two keys that no server of a cluster has both of, and tells a channel. Nothing stays.
_PROBE: Final = """
redis.call('SET', KEYS[1], '1')
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('PUBLISH', ARGV[1], '')
"""


def connect(url: str, *, text: bool = False) -> redis.Redis:
    """Return a client that has not connected yet; replies are bytes, or str with `text`. Raises BadStoreUrl."""
    return _client(url, text=text, timeout_s=TIMEOUT_S, retries=2)


def refusal(error: BaseException) -> str | None:
    """Return why the server will refuse the call however often it is repeated; None where it may succeed later."""
    words = f"{type(error).__name__} {error}"
    return next((why for pattern, why in _REFUSALS if pattern.search(words)), None)


def failure(store: str, error: BaseException) -> str:
    """Return a sentence about a call of the Redis `store` ("job store") that failed, without host and password."""
    why = refusal(error)
    if why is None:
        return f"the Redis {store} did not answer ({type(error).__name__})"
    return f"the Redis {store} refuses, permanently: {why}"


def check(url: str, prefix: str) -> str | None:
    """Return why the server refuses to be read and written under `prefix`; None where it does not, or is away.

    Raises BadStoreUrl.
    """
    with closing(_client(url, text=True, timeout_s=2.0, retries=0)) as client:
        try:
            client.eval(_PROBE, 2, f"{prefix}:probe:1", f"{prefix}:probe:2", f"{prefix}:probe")
        except (exceptions.RedisError, OSError) as error:
            return refusal(error)
    return None


def _client(url: str, *, text: bool, timeout_s: float, retries: int) -> redis.Redis:
    with suppress(ValueError, TypeError):
        if not re.fullmatch(r"/?\d*", urlsplit(url).path):  # redis-py would take database 0
            raise ValueError("database")
        client = redis.Redis.from_url(
            url,
            decode_responses=text,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries),
        )
        client.connection_pool.make_connection()  # does not connect, but refuses unknown options of the URL
        return client
    # The message of from_url quotes parts of the URL, which may hold the password: the error is not even chained.
    raise BadStoreUrl("expected redis://[[user]:password@]host[:port][/number of the database], got another form")
