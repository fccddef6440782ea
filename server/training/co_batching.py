"""Several fits, one forward and one backward: rows of different jobs share a batch while they learn, too.

A fit is a generator. It yields a `ForwardRequest` and is sent the result; it never runs the backbone itself. `run`
gathers the requests of all fits under way, lays them out in lanes, one lane for each request, and runs them in one
forward. The losses are added, and since no two fits share a parameter, the sum's gradient is each one's own. Each fit
keeps its optimiser, its schedule and its end; an error in one fit ends that fit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.lens import Condition
from server.engine.reader import Joined, Reads, Recorded

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class RecordedRows:
    """What readers read of those of a batch's rows whose trunk has been run before. Row i of the batch is row order[i]
    of these with the others, whose image tokens the ask brings, behind them; None where there are no others."""

    rows: Recorded
    order: Tensor | None


@dataclass(frozen=True)
class ForwardRequest:
    """Rows for the next forward. x: [B, N, D], the image tokens that enter block `start`; of readers those that enter
    the first block, of the rows that are not `kept`.

    With `loss`, features [B, D] → scalar, the fit learns: it is sent the loss, its gradients being in place. Without,
    it is sent the features, or with `until` the tokens [B, N, D] that enter that block, or with `read_from` the
    `Recorded` of readers that start there, and no gradient is kept.
    """

    x: Tensor
    condition: Condition
    loss: Callable[[Tensor], Tensor] | None = None
    start: int = 0
    until: int | None = None
    read_from: int | None = None
    kept: RecordedRows | None = None


@dataclass(frozen=True)
class ExclusiveStep:
    """A turn for work that is not the shared backbone's: a fit whose weights are its own lets the others have theirs
    between two of its steps. It is sent what `work` returns."""

    work: Callable[[], Tensor]


Fitting = Generator[ForwardRequest | ExclusiveStep, Any, Outcome]  # sent what the ask says
More = Callable[[], Iterable[Fitting[Outcome]]]


def nothing_more() -> tuple[Fitting[Outcome], ...]:
    """For a group that nobody joins."""
    return ()


def run(
    backbone: Backbone, fits: Iterable[Fitting[Outcome]], more: More[Outcome] = nothing_more
) -> list[Outcome | Exception]:
    """Run fits to their ends, in one group. Each one's outcome in order: what it returned, or what it raised.

    `more` is asked before every forward for fits that join. KeyboardInterrupt and its like end the whole group.
    """
    group: list[_Member[Outcome]] = []
    joining = list(fits)
    while True:
        group += [_Member(fit) for fit in joining]
        asking = [member for member in group if member.ask is not None]
        if not asking:
            return [member.outcome for member in group]  # type: ignore[misc]  # all have ended
        for member in asking:
            if isinstance(member.ask, ExclusiveStep):
                member.take_turn(member.ask)
        for learns in (False, True):
            if members := [member for member in asking if member.asks and member.learns is learns]:
                _answer(backbone, members, learns)
        joining = list(more())


def alone(backbone: Backbone, fit: Fitting[Outcome]) -> Outcome:
    """Run one fit; what it raises is raised."""
    [outcome] = run(backbone, [fit])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class _Member(Generic[Outcome]):
    """A fit in the group: what it asks for now, or how it ended."""

    def __init__(self, fit: Fitting[Outcome]) -> None:
        self._fit = fit
        self.ask: ForwardRequest | ExclusiveStep | None = None
        self.outcome: Outcome | Exception | None = None
        self._advance(lambda: next(fit))

    @property
    def asks(self) -> bool:
        """Whether it wants something of the shared backbone."""
        return isinstance(self.ask, ForwardRequest)

    @property
    def learns(self) -> bool:
        return isinstance(self.ask, ForwardRequest) and self.ask.loss is not None

    def take_turn(self, turn: ExclusiveStep) -> None:
        try:
            answer = turn.work()
        except Exception as error:  # what breaks one fit is its own affair
            self.throw(error)
        else:
            self.send(answer)

    def send(self, answer: Tensor | Recorded) -> None:
        self._advance(lambda: self._fit.send(answer))

    def throw(self, error: Exception) -> None:
        self._advance(lambda: self._fit.throw(error))

    def _advance(self, step: Callable[[], ForwardRequest | ExclusiveStep]) -> None:
        self.ask = None
        try:
            self.ask = step()
        except StopIteration as end:
            self.outcome = end.value
        except Exception as error:  # handed to whoever runs the group
            self.outcome = error


def _answer(backbone: Backbone, members: Sequence[_Member[Outcome]], learns: bool) -> None:
    """One forward for all; where the device is too small for that, one for each."""
    try:
        answers: Sequence[Tensor | Recorded]
        answers = _learn(backbone, members) if learns else _look(backbone, members)
    except torch.OutOfMemoryError as error:
        if len(members) == 1:
            members[0].throw(error)
            return
    else:
        for member, answer in zip(members, answers, strict=True):
            member.send(answer)
        return
    for member in members:
        _answer(backbone, [member], learns)


@torch.inference_mode()
def _look(backbone: Backbone, members: Sequence[_Member[Outcome]]) -> list[Tensor | Recorded]:
    asks = [member.ask for member in members if isinstance(member.ask, ForwardRequest)]
    partly = [_partly(backbone, ask) for ask in asks]
    through = iter(_features(backbone, [ask for ask, found in zip(asks, partly, strict=True) if found is None]))
    return [next(through) if found is None else found for found in partly]


def _partly(backbone: Backbone, ask: ForwardRequest) -> Tensor | Recorded | None:
    """What comes of an ask that stops on its way through the trunk; None for others."""
    if ask.read_from is not None:
        return vit.record(backbone, ask.x, ask.read_from)
    return None if ask.until is None else vit.tokens_at(backbone, ask.x, ask.until, ask.start)


def _learn(backbone: Backbone, members: Sequence[_Member[Outcome]]) -> list[Tensor]:
    asks = [member.ask for member in members if isinstance(member.ask, ForwardRequest)]
    losses = [ask.loss(found) for ask, found in zip(asks, _features(backbone, asks), strict=True) if ask.loss]
    torch.autograd.backward(losses)
    return [loss.detach() for loss in losses]


def _features(backbone: Backbone, asks: Sequence[ForwardRequest]) -> list[Tensor]:
    if not asks:
        return []
    lanes = [_lanes(backbone, ask) for ask in asks]
    features = vit.forward_lanes(backbone, [lane for own in lanes for lane in own])
    ends = accumulate(map(len, lanes))
    return [features[end - 1] for end in ends]


def _lanes(backbone: Backbone, ask: ForwardRequest) -> list[vit.Lane]:
    """The last one's features are the ask's. While readers learn, the trunk is no part of the forward: it has been run
    by itself, without a gradient."""
    if ask.condition.reads_from is None or (ask.kept is None and not torch.is_grad_enabled()):
        return vit.lanes_of(backbone, ask.x, ask.condition, ask.start)
    return [vit.Lane.reading(ask.condition, Reads(_trunk(backbone, ask, ask.condition.reads_from)))]


def _trunk(backbone: Backbone, ask: ForwardRequest, start: int) -> Recorded | Joined:
    if ask.kept is None:
        return vit.record(backbone, ask.x, start)
    if ask.kept.order is None:
        return ask.kept.rows
    return Joined((ask.kept.rows, vit.record(backbone, ask.x, start)), ask.kept.order)
