"""The scheduler: fair over tenants, inside a tenant over its tasks, and first in first out inside a task.

    next tenant ─► its next task ─► its oldest row          both by start-time fair queueing, see `fair_queue.py`

So a tenant with a hundred tasks gets as much as a tenant with one, and a lone row of a task is in the next batch
although another task has a thousand rows waiting. Weights make the shares unequal.

Pure policy: no torch, no asyncio, the clock is passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count

from .fair_queue import FairQueue
from .row import Row

FlowKey = tuple[str, str]
Flow = deque[tuple[int, Row]]  # (order of arrival, row)


class Full(Exception):
    """The queue is full."""


def equal_weights(flow: FlowKey) -> float:
    """The weight of a task among its tenant's tasks."""
    return 1.0


def equal_shares(tenant: str) -> float:
    return 1.0


class Tenant:
    """A tenant's tasks that have rows waiting, or were served ahead of their turn."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self.turns = FairQueue(weight)
        self.flows: dict[str, Flow] = {}

    @property
    def head(self) -> int | None:
        """The arrival number of the row that goes next; None when none waits."""
        task = self.turns.first()
        return None if task is None else self.flows[task][0][0]


class Scheduler:
    """The waiting rows and their order. `len()` counts rows, including rows whose clients have left."""

    def __init__(
        self,
        max_rows: int,
        *,
        weight: Callable[[FlowKey], float] = equal_weights,
        share: Callable[[str], float] = equal_shares,
    ) -> None:
        """weight: of a task inside its tenant; share: of a tenant."""
        self.max_rows = max_rows
        self._weight, self._share = weight, share
        self._departed: list[Row] = []  # dropped, until `pop_departed`
        self._arrivals = count()
        self._reset()

    def _reset(self) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._turns = FairQueue(self._share)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def set_aside(self) -> int:
        """Dropped rows that `pop_departed` has not returned yet."""
        return len(self._departed)

    def offer(self, row: Row) -> None:
        """Queue a row; where the queue is full, rows whose clients have left are dropped first. Raises Full."""
        if self._rows >= self.max_rows and not self.sweep():
            raise Full
        name, task = row.flow
        tenant = self._tenants.get(name) or self._open(name)
        flow = tenant.flows.setdefault(task, deque())
        order = next(self._arrivals)
        flow.append((order, row))
        self._rows += 1
        if len(flow) == 1:
            asleep = tenant.head is None
            tenant.turns.wait(task, order)
            if asleep:
                self._turns.wait(name, order)

    def take(self, now: float, max_rows: int) -> tuple[list[Row], list[Row]]:
        """Remove and return (the next batch, the rows past their deadline); departed rows are set aside."""
        batch: list[Row] = []
        expired: list[Row] = []
        while len(batch) < max_rows and (name := self._turns.first()) is not None:
            task = self._tenants[name].turns.first()
            assert task is not None, "a tenant that waits has a task that waits"
            row = self._take_head((name, task), now, batch, expired)
            if row is not None:
                self._take_companions(row, now, max_rows, batch, expired)
        self._forget_idle()
        return batch, expired

    def sweep(self) -> int:
        """Drop the rows whose clients have left; returns how many."""
        before = self._rows
        for (name, task), flow in list(self._flows()):
            gone = [row for _, row in flow if row.departed]
            if not gone:
                continue
            head = flow[0]
            kept = deque(entry for entry in flow if not entry[1].departed)
            self._tenants[name].flows[task] = kept
            self._departed += gone
            self._rows -= len(gone)
            if not kept or kept[0] is not head:
                self._note_head((name, task))
        return before - self._rows

    def oldest(self) -> float | None:
        """When the row that has waited longest arrived; None when none waits."""
        return min((flow[0][1].arrived for _, flow in self._flows()), default=None)

    def pop_departed(self) -> list[Row]:
        """The rows dropped since the last call because their clients had left."""
        departed, self._departed = self._departed, []
        return departed

    def clear(self) -> list[Row]:
        """Remove and return all waiting rows, in order of arrival."""
        entries = sorted((entry for _, flow in self._flows() for entry in flow), key=lambda entry: entry[0])
        self._reset()
        return [row for _, row in entries]

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance. Cheap enough for an idle moment."""
        waiting = dict(self._flows())
        assert self._rows == sum(map(len, waiting.values())), "row count"
        self._turns.check_integrity({name for name, _ in waiting})
        for name, tenant in self._tenants.items():
            tenant.turns.check_integrity({task for own, task in waiting if own == name})
        for key, flow in waiting.items():
            orders = [order for order, _ in flow]
            assert orders == sorted(orders), "order inside a flow"
            assert all(row.flow == key for _, row in flow), "row in a foreign flow"

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self, name: str) -> Tenant:
        tenant = self._tenants[name] = Tenant(lambda task: self._weight((name, task)))
        return tenant

    def _flows(self) -> Iterator[tuple[FlowKey, Flow]]:
        """Flows with rows."""
        for name, tenant in self._tenants.items():
            for task, flow in tenant.flows.items():
                if flow:
                    yield (name, task), flow

    def _take_head(
        self, key: FlowKey, now: float, batch: list[Row], expired: list[Row], *, early: bool = False
    ) -> Row | None:
        """Take the flow's first row into the batch and charge tenant and task; a dropped row is not charged.
        `early`: ahead of the turn of both."""
        name, task = key
        tenant = self._tenants[name]
        row = tenant.flows[task].popleft()[1]
        self._rows -= 1
        served = row.deadline > now and not row.departed
        if served:
            self._turns.serve(name, early=early and not self._turns.alone(name))
            tenant.turns.serve(task, early=early)
            batch.append(row)
        elif row.deadline <= now:
            expired.append(row)
        else:
            self._departed.append(row)
        self._note_head(key)
        return row if served else None

    def _note_head(self, key: FlowKey) -> None:
        """Update the queues after the first row of a flow, and so perhaps of its tenant, has changed."""
        name, task = key
        tenant = self._tenants[name]
        if flow := tenant.flows[task]:
            tenant.turns.wait(task, flow[0][0])
        else:
            tenant.turns.sleep(task)
        head = tenant.head
        if head is None:
            self._turns.sleep(name)
        else:
            self._turns.wait(name, head)

    def _take_companions(self, row: Row, now: float, max_rows: int, batch: list[Row], expired: list[Row]) -> None:
        """Take the same image's rows for other tasks along: each at most one row ahead of its task's turn, and of its
        tenant's where other tenants wait."""
        tenant = self._tenants[row.tenant]
        for other in row.companions:
            flow = tenant.flows.get(other.task) if other.tenant == row.tenant else None
            if not flow or flow[0][1] is not other or len(batch) >= max_rows:
                continue
            of_tenant = self._turns.alone(row.tenant) or self._turns.near(row.tenant)
            if of_tenant and tenant.turns.near(other.task):
                self._take_head(other.flow, now, batch, expired, early=True)

    def _forget_idle(self) -> None:
        """Forget the tags of tenants and tasks that have caught up; all of them when nothing waits."""
        if not self._rows:
            self._reset()
            return
        for tenant in self._tenants.values():
            for task in tenant.turns.forget_idle():
                del tenant.flows[task]
        for name in self._turns.forget_idle():
            del self._tenants[name]
