"""Fair admission: a full queue still admits tenants and tasks below their share, so a flood refuses only itself.

    fewer rows are taken than there are places                                  everybody is admitted
    other tenants have rows, and this tenant has less than an equal share       up to a quarter more: `with_reserve`
    other tasks of the tenant have rows, and this task has less than an equal   up to an eighth more: a loud tenant's
    share of the tenant's equal share                                           quiet tasks leave room for quiet tenants

Fair queueing (`scheduler`) serves a quiet row next; without this it would not get into the queue at all. A row counts
from the reservation of its place to its answer. A request for several tasks belongs to no task, nor do rows for the
backbone's features: they are admitted by their tenant.

Pure policy: no asyncio.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Final

from .scheduler import FlowKey

RowsByFlow = Mapping[str, Mapping[str, int]]  # rows by tenant and task

NO_FLOW: Final[FlowKey] = ("", "")  # of no tenant and no task
NO_ROWS: Final[RowsByFlow] = {}


def with_reserve(most: int) -> int:
    """The queue's capacity where `most` rows may wait: the reserve for tenants and tasks under their share on top."""
    return most + math.ceil(most / 4)


class FairShares:
    """Rows reserved or in the queue, by tenant and task; "" is no task. `beside`: rows that are counted elsewhere."""

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
        """Whether a full queue admits so many rows more.

        `taken`: rows in the queue; `places`: today's limit; `most`: the configured maximum.
        """
        if self.tenant_under_share(flow[0], rows, places, beside):
            return taken + rows <= with_reserve(most)
        return taken + rows <= most + math.ceil(most / 8) and self.task_under_share(flow, rows, places, beside)

    def tenant_under_share(self, tenant: str, rows: int, places: int, beside: RowsByFlow = NO_ROWS) -> bool:
        """Whether a tenant with so many rows more has at most an equal share beside the other tenants with rows."""
        tenants = self._held.keys() | beside.keys()
        others = len(tenants) - (tenant in tenants)
        held = sum(self._held.get(tenant, {}).values()) + sum(beside.get(tenant, {}).values())
        return others > 0 and (held + rows) * (others + 1) <= places

    def task_under_share(self, flow: FlowKey, rows: int, places: int, beside: RowsByFlow = NO_ROWS) -> bool:
        """Whether a task with so many rows more has at most an equal share, among its tenant's tasks, of the
        tenant's."""
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
    """The flow that admits a request: its task's where it is for one task, else its tenant's."""
    if len(flows) == 1:
        return next(iter(flows))
    tenants = {tenant for tenant, _ in flows}
    return (next(iter(tenants)) if len(tenants) == 1 else "", "")
