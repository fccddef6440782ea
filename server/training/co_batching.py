"""Co-batching: the rows of several fits share one forward and one backward.

A fit is a generator. It yields a `ForwardRequest` and is sent the result; it never runs the backbone itself. `run`
gathers the requests of all running fits, lays them out in lanes, one lane for each request, and runs them in one
forward. The losses are added. No two fits share a parameter, so the gradient of the sum is the gradient of each fit's
own loss. Each fit keeps its optimiser, its schedule and its number of steps; an error in one fit ends only that fit.
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
    """Cached trunk outputs for a part of a batch: `concat(rows, fresh)[order]` restores the batch's order, where
    `fresh` are the outputs for the request's `x`. `order` is None where all rows of the batch are cached."""

    rows: Recorded
    order: Tensor | None


@dataclass(frozen=True)
class ForwardRequest:
    """Rows for the next forward. x: image tokens [B, N, D] that enter block `start`; for a reader those that enter the
    first block, of the rows that are not in `recorded`.

    With `loss`, features [B, D] → scalar, the backward runs too: the fit is sent the loss, and its parameters have
    their gradients. Without `loss` no gradient is computed, and the fit is sent the features [B, D], with `until` the
    tokens [B, N, D] that enter that block, with `read_from` the `Recorded` for readers that start there.
    """

    x: Tensor
    condition: Condition
    loss: Callable[[Tensor], Tensor] | None = None
    start: int = 0
    until: int | None = None
    read_from: int | None = None
    recorded: RecordedRows | None = None


@dataclass(frozen=True)
class ExclusiveStep:
    """A step that does not use the shared backbone, as in the fit of a baseline with a network of its own. The steps of
    the other fits run between two of these. The fit is sent the result of `work`."""

    work: Callable[[], Tensor]


Request = ForwardRequest | ExclusiveStep
Fitting = Generator[Request, Any, Outcome]  # it is sent the result of each request
Joining = Callable[[], Iterable[Fitting[Outcome]]]


def none_joining() -> tuple[Fitting[Outcome], ...]:
    """The default `joining` of `run`."""
    return ()


def run(
    backbone: Backbone, fits: Iterable[Fitting[Outcome]], joining: Joining[Outcome] = none_joining
) -> list[Outcome | Exception]:
    """Run all fits to their ends. Returns, in order, what each fit returned or the exception that it raised.

    `joining` is called before every forward and returns further fits. KeyboardInterrupt and its like end all fits.
    """
    group: list[_Member[Outcome]] = []
    new = list(fits)
    while True:
        group += [_Member(fit) for fit in new]
        running = [member for member in group if member.request is not None]
        if not running:
            return [member.outcome for member in group]  # type: ignore[misc]  # all have ended
        for member in running:
            if isinstance(member.request, ExclusiveStep):
                member.run_exclusive(member.request)
        for learns in (False, True):
            if members := [member for member in running if member.wants_forward and member.learns is learns]:
                _answer(backbone, members, learns)
        new = list(joining())


def run_alone(backbone: Backbone, fit: Fitting[Outcome]) -> Outcome:
    """Run one fit and return its outcome. Raises what the fit raises."""
    [outcome] = run(backbone, [fit])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class _Member(Generic[Outcome]):
    """A fit of the group: its current request, or its outcome."""

    def __init__(self, fit: Fitting[Outcome]) -> None:
        self._fit = fit
        self.request: Request | None = None
        self.outcome: Outcome | Exception | None = None
        self._advance(lambda: next(fit))

    @property
    def wants_forward(self) -> bool:
        return isinstance(self.request, ForwardRequest)

    @property
    def learns(self) -> bool:
        return isinstance(self.request, ForwardRequest) and self.request.loss is not None

    def run_exclusive(self, step: ExclusiveStep) -> None:
        try:
            answer = step.work()
        except Exception as error:  # it ends this fit only
            self.throw(error)
        else:
            self.send(answer)

    def send(self, answer: Tensor | Recorded) -> None:
        self._advance(lambda: self._fit.send(answer))

    def throw(self, error: Exception) -> None:
        self._advance(lambda: self._fit.throw(error))

    def _advance(self, step: Callable[[], Request]) -> None:
        self.request = None
        try:
            self.request = step()
        except StopIteration as end:
            self.outcome = end.value
        except Exception as error:  # `run` returns it
            self.outcome = error


def _answer(backbone: Backbone, members: Sequence[_Member[Outcome]], learns: bool) -> None:
    """Run one forward for all members, or one for each where the device has too little memory for that."""
    requests = [member.request for member in members if isinstance(member.request, ForwardRequest)]
    try:
        answers: Sequence[Tensor | Recorded]
        answers = _losses(backbone, requests) if learns else _outputs(backbone, requests)
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
def _outputs(backbone: Backbone, requests: Sequence[ForwardRequest]) -> list[Tensor | Recorded]:
    """The answers to requests without a loss, in order."""
    partial = [_partial_output(backbone, request) for request in requests]
    complete = [request for request, output in zip(requests, partial, strict=True) if output is None]
    features = iter(_features(backbone, complete))
    return [next(features) if output is None else output for output in partial]


def _partial_output(backbone: Backbone, request: ForwardRequest) -> Tensor | Recorded | None:
    """The answer to a request that needs only a part of the trunk; None for other requests."""
    if request.read_from is not None:
        return vit.record(backbone, request.x, request.read_from)
    return None if request.until is None else vit.tokens_at(backbone, request.x, request.until, request.start)


def _losses(backbone: Backbone, requests: Sequence[ForwardRequest]) -> list[Tensor]:
    """The losses, after one backward for all of them."""
    features = _features(backbone, requests)
    losses = [request.loss(output) for request, output in zip(requests, features, strict=True) if request.loss]
    torch.autograd.backward(losses)
    return [loss.detach() for loss in losses]


def _features(backbone: Backbone, requests: Sequence[ForwardRequest]) -> list[Tensor]:
    """Features [B, D] of each request, from one forward."""
    if not requests:
        return []
    groups = [_lanes(backbone, request) for request in requests]
    features = vit.forward_lanes(backbone, [lane for lanes in groups for lane in lanes])
    return [features[end - 1] for end in accumulate(map(len, groups))]


def _lanes(backbone: Backbone, request: ForwardRequest) -> list[vit.Lane]:
    """The lanes of a request; its features are those of the last lane. The trunk of a reader that learns runs outside
    of the shared forward, without a gradient."""
    start = request.condition.reads_from
    if start is None or (request.recorded is None and not torch.is_grad_enabled()):
        return vit.lanes_of(backbone, request.x, request.condition, request.start)
    return [vit.Lane.reading(request.condition, Reads(_trunk(backbone, request, start)))]


def _trunk(backbone: Backbone, request: ForwardRequest, start: int) -> Recorded | Joined:
    recorded = request.recorded
    if recorded is None:
        return vit.record(backbone, request.x, start)
    if recorded.order is None:
        return recorded.rows
    return Joined((recorded.rows, vit.record(backbone, request.x, start)), recorded.order)
