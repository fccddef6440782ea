"""A full queue lets in who has less than a share of it: a flood is no reason to send somebody else away.

    fewer rows taken than there are places                                     everybody
    other tenants have rows, and this one less than an equal share             up to a quarter more: `with_reserve`
    other tasks of the tenant have rows, and this one less than an equal       half as many: a loud tenant's quiet
    share of what an equal share of the tenant is                              tasks leave room for quiet tenants

Taking turns (`scheduler`) makes a quiet row the next one; without this it would not get to wait at all. Who holds what
counts from the promise of a place to the answer. A request for several tasks is none's, and rows for the backbone's
features are no task's: they are let in as their tenant is.

Pure policy: no asyncio.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Final

from .scheduler import FlowKey

RowsByFlow = Mapping[str, Mapping[str, int]]  # rows by tenant and task

NO_FLOW: Final[FlowKey] = ("", "")  # no tenant's and no task's
NO_ROWS: Final[RowsByFlow] = {}


def with_reserve(most: int) -> int:
    """Rows that there must be room for where `most` may wait: those of the quiet come on top."""
    return most + math.ceil(most / 4)


class FairShares:
    """Rows by tenant, and in each by task; "" is no task. `beside`: rows that are counted elsewhere."""

    def __init__(self) -> None:
        self._held: dict[str, Counter[str]] = {}

    def take(self, flow: FlowKey, rows: int) -> None:
        tenant, task = flow
        if rows:
            self._held.setdefault(tenant, Counter())[task] += rows

    def give_back(self, flow: FlowKey, rows: int) -> None:
        if not rows:
            return
        tenant, task = flow
        tasks = self._held[tenant]
        tasks[task] -= rows
        if not tasks[task]:
            del tasks[task]
        if not tasks:
            del self._held[tenant]

    def admits(
        self, flow: FlowKey, rows: int, *, taken: int, most: int, places: int, beside: RowsByFlow = NO_ROWS
    ) -> bool:
        """Whether a full queue takes so many rows more. taken: places that are; places: those that may be as things
        are, `most` ever."""
        if self.tenant_under_share(flow[0], rows, places, beside):
            return taken + rows <= with_reserve(most)
        return taken + rows <= most + math.ceil(most / 8) and self.task_under_share(flow, rows, places, beside)

    def tenant_under_share(self, tenant: str, rows: int, places: int, beside: RowsByFlow = NO_ROWS) -> bool:
        """Whether it has, with so many rows more, no more than its share beside others that have some."""
        tenants = self._held.keys() | beside.keys()
        others = len(tenants) - (tenant in tenants)
        held = sum(self._held.get(tenant, {}).values()) + sum(beside.get(tenant, {}).values())
        return others > 0 and (held + rows) * (others + 1) <= places

    def task_under_share(self, flow: FlowKey, rows: int, places: int, beside: RowsByFlow = NO_ROWS) -> bool:
        """The same of a task beside others of its tenant, in what would be the tenant's share."""
        tenant, task = flow
        own: Mapping[str, int] = self._held.get(tenant, {})
        elsewhere = beside.get(tenant, {})
        tasks = own.keys() | elsewhere.keys()
        others = len(tasks) - (task in tasks)
        held = own.get(task, 0) + elsewhere.get(task, 0)
        tenants = len(self._held.keys() | beside.keys())
        return bool(task) and others > 0 and (held + rows) * (others + 1) * tenants <= places

    def check_integrity(self, total: int) -> None:
        assert all(tasks and min(tasks.values()) > 0 for tasks in self._held.values()), "rows of tenants and tasks"
        assert sum(tasks.total() for tasks in self._held.values()) == total, "rows of all tenants"


def common_flow(flows: set[FlowKey]) -> FlowKey:
    """Under which a request is let in: its task's, where it is for one."""
    if len(flows) == 1:
        return next(iter(flows))
    tenants = {tenant for tenant, _ in flows}
    return (next(iter(tenants)) if len(tenants) == 1 else "", "")
