"""Rate limits by key: images per second and jobs per day, by the `limits` library, in memory or in Redis.

Images are counted over a minute, so a key may use a minute's worth at once. Several servers on one Redis count
together. While Redis is away no request is refused: predictions outlive it. A Redis that hangs is waited for once, and
then not used until it has answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import SlidingWindowCounterRateLimiter

from prompts_store import redis_connection
from server.errors import QueueFull

from .key import Key

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 1.0
PATIENCE_S: Final = 2.0  # for a whole call; TIMEOUT_S is for each of its steps, without the look-up of the host name
WINDOW_S: Final = 60


class Meter:
    """Counts by key. Without a Redis URL each process counts for itself."""

    def __init__(self, redis_url: str | None = None) -> None:
        self._shared = redis_url is not None
        self._limiter = SlidingWindowCounterRateLimiter(_storage(redis_url))
        self._late: asyncio.Task[bool] | None = None
        self._failing = False

    async def images(self, key: Key, count: int) -> None:
        """Raises QueueFull rate_limited."""
        rate = key.allowance.images_per_s
        if rate is None or count == 0:
            return
        most = max(1, round(rate * WINDOW_S))
        if not await self._taken(RateLimitItemPerMinute(most), "images", key.id, count):
            detail = (
                f"this key may send {rate:g} images a second, {most} in a minute; {count} more exceed the limit now"
            )
            wait_s = await self._wait_s(RateLimitItemPerMinute(most), "images", key.id)
            raise QueueFull(detail, code="rate_limited", retry_after_s=wait_s)

    @asynccontextmanager
    async def job(self, key: Key) -> AsyncIterator[None]:
        """Count the job that the block submits; a block that raises has submitted none. Raises QueueFull
        quota_exceeded."""
        most = key.allowance.jobs_per_day
        if most is None:
            yield
            return
        limit = RateLimitItemPerDay(max(1, most))
        if most == 0 or not await self._taken(limit, "jobs", key.id, 1):
            wait_s = await self._wait_s(limit, "jobs", key.id)
            detail = f"this key may start {most} jobs in 24 hours, and has started them"
            raise QueueFull(detail, code="quota_exceeded", retry_after_s=wait_s)
        try:
            yield
        except BaseException:
            await self._taken(limit, "jobs", key.id, -1)  # counted before, as many may be submitted at once
            raise

    async def _taken(self, item: RateLimitItem, what: str, key_id: str, cost: int) -> bool:
        if not self._shared:
            return self._limiter.hit(item, what, key_id, cost=cost)
        if self._late is not None and not self._late.done():
            return True
        call = asyncio.create_task(self._shared_taken(item, what, key_id, cost))
        if (await asyncio.wait([call], timeout=PATIENCE_S))[0]:
            return call.result()
        self._late = call
        return True

    async def _shared_taken(self, item: RateLimitItem, what: str, key_id: str, cost: int) -> bool:
        try:
            taken = await asyncio.to_thread(self._limiter.hit, item, what, key_id, cost=cost)
        except StorageError as error:
            if not self._failing:  # once, not for every request
                log.warning("limits are not counted: %s", redis_connection.failure("count", error.storage_error))
            self._failing = True
            return True
        self._failing = False
        return taken

    async def _wait_s(self, item: RateLimitItem, what: str, key_id: str) -> float:
        try:
            stats = await asyncio.to_thread(self._limiter.get_window_stats, item, what, key_id)
        except StorageError:
            return 1.0
        return min(max(1.0, stats.reset_time - time.time()), float(item.get_expiry()))  # the clock may have been set


def _storage(url: str | None) -> Storage:
    if url is None:
        return MemoryStorage()
    return RedisStorage(
        url, key_prefix="lensrack:limits", wrap_exceptions=True,
        socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S,
    )  # fmt: skip
