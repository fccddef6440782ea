"""Threads for long work that all tenants share, of which one tenant never takes the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class SharedLimiter:
    """At most `total` calls run at once, of one tenant at most `total - 1`; the others wait in turn."""

    def __init__(self, total: int) -> None:
        self._all = CapacityLimiter(total)
        self._share = max(1, total - 1)
        self._of_tenant: dict[str, CapacityLimiter] = {}

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Run `work` in a thread. The server's own tenant, "", may take all threads."""
        if not tenant:
            return await to_thread.run_sync(work, limiter=self._all)
        mine = self._of_tenant.setdefault(tenant, CapacityLimiter(self._share))
        try:
            async with mine:
                return await to_thread.run_sync(work, limiter=self._all)
        finally:
            if not mine.statistics().tasks_waiting and not mine.borrowed_tokens:
                self._of_tenant.pop(tenant, None)
