"""The row: one image for one task, waiting for the engine with its own reply channel and its own stopwatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio


@dataclass(slots=True)
class Stopwatch:
    """Seconds a row waited for the engine, and seconds of the forward that answered it."""

    queue_s: float = 0.0
    compute_s: float = 0.0


def no_op() -> None:
    """Nothing to do when the row leaves."""


@dataclass(slots=True, eq=False)
class Row:
    """One image for one task. `deadline` and `arrived` are seconds of the batcher's clock.

    `seat` says where the task's lens sits; None asks for the backbone's features of the image instead of logits.
    `reply` gets the logits [C] (or the features [D]), or a ServiceError. Cancelling it withdraws the row.
    `companions` are rows of the same request that show other tasks the very same image: one trunk pass can serve all.
    `leave` is called once, when the batcher will not touch the row any more: only then may its seat be given back,
    because a row whose client has gone can still be inside a running forward.
    `context` is the request's: what the log and the trace say about the row belongs there.
    """

    task: str
    tenant: str
    seat: Any
    image: Any
    deadline: float
    arrived: float
    reply: asyncio.Future[Any]
    companions: Sequence[Row] = ()
    leave: Callable[[], None] = no_op
    watch: Stopwatch = field(default_factory=Stopwatch)
    context: Context = field(default_factory=copy_context)

    @property
    def flow(self) -> tuple[str, str]:
        """What fairness is measured over."""
        return self.tenant, self.task

    @property
    def departed(self) -> bool:
        """Nobody waits for the answer any more."""
        return self.reply.done()
