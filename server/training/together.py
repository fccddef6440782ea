"""Several fits, one forward and one backward: rows of different jobs share a batch while they learn, too.

A fit is a generator. It yields what it wants of the backbone (`Ask`) and is sent what came of it; it never runs the
backbone itself. `run` gathers the asks of all fits that are under way, lays them out in lanes, a lane an ask, and runs
them at once. The losses are added, and since no two fits share a parameter, the sum's gradient is each one's own. Each
fit keeps its optimiser, its schedule and its end; what breaks one of them is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.lens import Condition

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Ask:
    """Rows for the next forward. x: [B, N, D], the image tokens that enter block `start`.

    With `loss`, features [B, D] → scalar, the fit learns: it is sent the loss, its gradients being in place. Without,
    it is sent the features, or with `until` the tokens [B, N, D] that enter that block, and no gradient is kept.
    """

    x: Tensor
    condition: Condition
    loss: Callable[[Tensor], Tensor] | None = None
    start: int = 0
    until: int | None = None


@dataclass(frozen=True)
class Own:
    """A turn for work that is not the shared backbone's: a fit whose weights are its own lets the others have theirs
    between two of its steps. It is sent what `work` returns."""

    work: Callable[[], Tensor]


Fitting = Generator[Ask | Own, Tensor, Outcome]
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
            if isinstance(member.ask, Own):
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
        self.ask: Ask | Own | None = None
        self.outcome: Outcome | Exception | None = None
        self._advance(lambda: next(fit))

    @property
    def asks(self) -> bool:
        """Whether it wants something of the shared backbone."""
        return isinstance(self.ask, Ask)

    @property
    def learns(self) -> bool:
        return isinstance(self.ask, Ask) and self.ask.loss is not None

    def take_turn(self, turn: Own) -> None:
        try:
            answer = turn.work()
        except Exception as error:  # what breaks one fit is its own affair
            self.throw(error)
        else:
            self.send(answer)

    def send(self, answer: Tensor) -> None:
        self._advance(lambda: self._fit.send(answer))

    def throw(self, error: Exception) -> None:
        self._advance(lambda: self._fit.throw(error))

    def _advance(self, step: Callable[[], Ask | Own]) -> None:
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
def _look(backbone: Backbone, members: Sequence[_Member[Outcome]]) -> list[Tensor]:
    asks = [member.ask for member in members if isinstance(member.ask, Ask)]
    through = iter(_features(backbone, [ask for ask in asks if ask.until is None]))
    return [next(through) if ask.until is None else vit.tokens_at(backbone, ask.x, ask.until) for ask in asks]


def _learn(backbone: Backbone, members: Sequence[_Member[Outcome]]) -> list[Tensor]:
    asks = [member.ask for member in members if isinstance(member.ask, Ask)]
    losses = [ask.loss(found) for ask, found in zip(asks, _features(backbone, asks), strict=True) if ask.loss]
    torch.autograd.backward(losses)
    return [loss.detach() for loss in losses]


def _features(backbone: Backbone, asks: Sequence[Ask]) -> list[Tensor]:
    if not asks:
        return []
    return vit.forward_lanes(backbone, [vit.Lane.of(ask.x, ask.condition, ask.start) for ask in asks])
