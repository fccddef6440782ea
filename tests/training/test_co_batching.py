"""Several fits in one forward and backward: each ends as it would have ended by itself."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.engine import vit
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training import co_batching
from server.training.co_batching import Fitting, ForwardRequest
from server.training.fit import DivergedError, FitResult, fit, fitting
from server.training.progress import Progress
from server.training.recipe import Recipe, resolve
from tests.engine.golden_cases import golden_backbone
from tests.training.test_fit import QUICK, SPLITS

JOBS: list[tuple[str, dict[str, Any]]] = [
    ("vpt_deep", {"prompt_dropout": 0.2}),
    ("vpt_deep", {"prompts": 7, "seed": 3, "batch_size": 13, "epochs": 3}),
    ("vpt_shallow", {"optimizer": "sgd", "lr": 0.05}),
    ("linear", {"epochs": 9}),
    ("vpt_deep", {"augment": "flip", "class_weights": "balanced", "label_smoothing": 0.1, "patience": 2}),
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


def recipe_of(method: str, changes: dict[str, Any]) -> Recipe:
    return resolve(Registry().get(method).defaults, {**QUICK, **changes})


def job(backbone: Backbone, method: str, changes: dict[str, Any], **rest: Any) -> Fitting[FitResult]:
    return fitting(backbone, Registry().get(method), SPLITS, 3, recipe_of(method, changes), **rest)


def close(one: FitResult, other: FitResult) -> None:
    for name, value in one.params.items():
        np.testing.assert_allclose(value, other.params[name], rtol=1e-6, atol=1e-7)
    assert one.metrics["val"]["confusion"] == other.metrics["val"]["confusion"]
    np.testing.assert_allclose(one.metrics["curve"]["loss"], other.metrics["curve"]["loss"], atol=2e-5)


def test_jobs_in_one_batch_end_as_each_by_itself(backbone: Backbone) -> None:
    """Different methods, lengths, batch sizes, optimisers, schedules and ends; float64, so that only rounding is left
    of the order in which a product adds up."""
    found = co_batching.run(backbone, [job(backbone, *one) for one in JOBS])
    for (method, changes), outcome in zip(JOBS, found, strict=True):
        assert isinstance(outcome, FitResult)
        close(outcome, fit(backbone, Registry().get(method), SPLITS, 3, recipe_of(method, changes)))


def test_they_share_the_forward(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: list[int] = []
    forward = vit.forward_lanes

    def counted(backbone: Backbone, given: Any) -> Any:
        lanes.append(len(given))
        return forward(backbone, given)

    monkeypatch.setattr(vit, "forward_lanes", counted)
    co_batching.run(backbone, [job(backbone, "vpt_deep", {"seed": seed}) for seed in range(3)])
    assert set(lanes) == {3}


def test_one_that_breaks_leaves_its_neighbours_alone(backbone: Backbone) -> None:
    class CancelledError(Exception):
        pass

    def cancel(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 1):
            raise CancelledError

    cancelled = job(backbone, "vpt_deep", {}, on_progress=cancel)
    diverging = job(backbone, "vpt_deep", {"optimizer": "sgd", "lr": 1e30})
    well = job(backbone, *JOBS[0])
    found = co_batching.run(backbone, [cancelled, diverging, well])
    assert isinstance(found[0], CancelledError)
    assert isinstance(found[1], DivergedError)
    assert isinstance(found[2], FitResult)
    close(found[2], fit(backbone, Registry().get("vpt_deep"), SPLITS, 3, recipe_of(*JOBS[0])))


def test_a_job_may_join_later(backbone: Backbone) -> None:
    waiting = [job(backbone, *JOBS[1])]

    def more() -> list[Fitting[FitResult]]:
        return [waiting.pop()] if rounds() > 10 and waiting else []

    rounds = _counter()
    found = co_batching.run(backbone, [job(backbone, *JOBS[0])], more)
    assert len(found) == 2
    assert isinstance(found[1], FitResult)
    close(found[1], fit(backbone, Registry().get("vpt_deep"), SPLITS, 3, recipe_of(*JOBS[1])))


def test_what_one_batch_cannot_hold_runs_one_by_one(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = vit.forward_lanes

    def small(backbone: Backbone, lanes: Any) -> Any:
        if len(lanes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(backbone, lanes)

    monkeypatch.setattr(vit, "forward_lanes", small)
    found = co_batching.run(backbone, [job(backbone, *JOBS[0]), job(backbone, *JOBS[1])])
    assert all(isinstance(outcome, FitResult) for outcome in found)


def test_a_fit_too_big_even_by_itself_is_told_so(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(backbone: Backbone, lanes: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vit, "forward_lanes", full)
    [outcome] = co_batching.run(backbone, [job(backbone, *JOBS[0])])
    assert isinstance(outcome, torch.OutOfMemoryError)


def test_a_fit_that_never_asks_just_ends(backbone: Backbone) -> None:
    def silent() -> Generator[ForwardRequest, torch.Tensor, str]:
        yield from ()
        return "done"

    assert co_batching.run(backbone, [silent()]) == ["done"]


def _counter() -> Callable[[], int]:
    calls = [0]

    def count() -> int:
        calls[0] += 1
        return calls[0]

    return count


def test_recipes_differ(backbone: Backbone) -> None:
    """The jobs above are different fits, or the comparison would show nothing."""
    assert len({replace(recipe_of(*one), seed=0) for one in JOBS}) == len(JOBS)
