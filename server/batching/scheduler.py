"""Who goes next: start-time fair queueing over (tenant, task) flows, first in first out inside a flow.

Every flow has a start tag, the virtual time at which its next row may be served. The flow with the smallest tag is
served, virtual time moves to that tag, and the flow's tag grows by 1 / weight. A flow that wakes up starts at the
present virtual time: it neither saves up while it sleeps nor pays for what others took. So beside a flow with a
thousand rows waiting, a lone row of another task is in the next batch. (Goyal, Vin, Cheng: Start-time Fair Queueing,
SIGCOMM 1996.)

Pure policy: no torch, no asyncio, the clock is passed in.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from server.batching.row import Row

FlowKey = tuple[str, str]


class Full(Exception):
    """The queue holds as many rows as it may."""


@dataclass(slots=True)
class Flow:
    step: float  # virtual time that one row costs: 1 / weight
    start: float  # tag of the next row
    rows: deque[tuple[int, Row]] = field(default_factory=deque)  # (order of arrival, row)


def equal_weights(flow: FlowKey) -> float:
    return 1.0


class Scheduler:
    """The waiting rows, and the order in which they are served. `len()` counts rows, departed ones included."""

    def __init__(self, max_rows: int, *, weight: Callable[[FlowKey], float] = equal_weights) -> None:
        self.max_rows = max_rows
        self._departed: list[Row] = []  # dropped, until the owner asks for them
        self._weight = weight
        self._flows: dict[FlowKey, Flow] = {}
        self._heads: list[tuple[float, int, FlowKey]] = []  # heap; an entry counts while its row is its flow's head
        self._arrivals = count()
        self._now = 0.0  # virtual time
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def offer(self, row: Row) -> None:
        """Queue a row. Raises Full; rows that nobody waits for make room first."""
        if self._rows >= self.max_rows and not self.sweep():
            raise Full
        flow = self._flows.get(row.flow) or self._open(row.flow)
        if not flow.rows:
            flow.start = max(flow.start, self._now)
        flow.rows.append((next(self._arrivals), row))
        self._rows += 1
        if len(flow.rows) == 1:
            self._queue_head(row.flow, flow)

    def take(self, now: float, max_rows: int) -> tuple[list[Row], list[Row]]:
        """Remove and return (the next batch, the rows found past their deadline); departed rows are set aside."""
        batch: list[Row] = []
        expired: list[Row] = []
        while len(batch) < max_rows and (key := self._next_flow()) is not None:
            row = self._take_head(key, now, batch, expired)
            if row is not None:
                self._now = max(self._now, self._flows[key].start - self._flows[key].step)
                self._take_companions(row, now, max_rows, batch, expired)
        self._forget_idle()
        return batch, expired

    def sweep(self) -> int:
        """Drop the rows nobody waits for, to make room; returns how many there were."""
        before = self._rows
        for key, flow in self._flows.items():
            gone = [row for _, row in flow.rows if row.departed]
            if not gone:
                continue
            head = flow.rows[0]
            flow.rows = deque(entry for entry in flow.rows if not entry[1].departed)
            self._departed += gone
            self._rows -= len(gone)
            if flow.rows and flow.rows[0] is not head:
                self._queue_head(key, flow)
        return before - self._rows

    def oldest(self) -> float | None:
        """When the row that has waited longest arrived; None when none waits."""
        return min((flow.rows[0][1].arrived for flow in self._flows.values() if flow.rows), default=None)

    def pop_departed(self) -> list[Row]:
        """The rows that were dropped since the last call because nobody waited for them any more."""
        departed, self._departed = self._departed, []
        return departed

    def clear(self) -> list[Row]:
        """Remove and return everything that waits, in order of arrival."""
        entries = sorted((entry for flow in self._flows.values() for entry in flow.rows), key=lambda entry: entry[0])
        self._flows.clear()
        self._heads.clear()
        self._rows, self._now = 0, 0.0
        return [row for _, row in entries]

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance. Cheap enough for an idle moment."""
        backlogged = {key for key, flow in self._flows.items() if flow.rows}
        assert self._rows == sum(len(flow.rows) for flow in self._flows.values()), "row count"
        assert backlogged == {key for _, order, key in self._heads if self._is_head(order, key)}, "heads"
        for key in backlogged:
            orders = [order for order, _ in self._flows[key].rows]
            assert orders == sorted(orders), "order inside a flow"
            assert all(row.flow == key for _, row in self._flows[key].rows), "row in a foreign flow"

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self, key: FlowKey) -> Flow:
        flow = self._flows[key] = Flow(step=1.0 / self._weight(key), start=self._now)
        return flow

    def _queue_head(self, key: FlowKey, flow: Flow) -> None:
        # equal tags go by arrival, so the rows of one request, offered together, are served together
        heapq.heappush(self._heads, (flow.start, flow.rows[0][0], key))

    def _is_head(self, order: int, key: FlowKey) -> bool:
        flow = self._flows.get(key)
        return flow is not None and bool(flow.rows) and flow.rows[0][0] == order

    def _next_flow(self) -> FlowKey | None:
        while self._heads:
            _, order, key = heapq.heappop(self._heads)
            if self._is_head(order, key):
                return key
        return None

    def _take_head(self, key: FlowKey, now: float, batch: list[Row], expired: list[Row]) -> Row | None:
        """Take the flow's head into the batch and charge the flow; a row that is dropped instead costs it nothing."""
        flow = self._flows[key]
        row = flow.rows.popleft()[1]
        self._rows -= 1
        served = row.deadline > now and not row.departed
        if served:
            flow.start += flow.step
            batch.append(row)
        elif row.deadline <= now:
            expired.append(row)
        else:
            self._departed.append(row)
        if flow.rows:
            self._queue_head(key, flow)
        return row if served else None

    def _take_companions(self, row: Row, now: float, max_rows: int, batch: list[Row], expired: list[Row]) -> None:
        """Let the same image's rows for other tasks come along, none more than one row ahead of its turn."""
        for other in row.companions:
            flow = self._flows.get(other.flow)
            if flow is None or not flow.rows or flow.rows[0][1] is not other or len(batch) >= max_rows:
                continue
            if flow.start <= self._now + flow.step:
                self._take_head(other.flow, now, batch, expired)

    def _forget_idle(self) -> None:
        """A sleeping flow whose tag virtual time has passed is like a new one; with nothing waiting, all are."""
        if not self._rows:
            self.clear()
            return
        idle = [key for key, flow in self._flows.items() if not flow.rows and flow.start <= self._now]
        for key in idle:
            del self._flows[key]
