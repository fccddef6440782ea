"""A comparison is the fits that it consists of, each as it would be by itself, and goes on where it was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prompts_store import Backbone as Fingerprint
from prompts_store import Bundle, Manifest
from server.engine.backbone import Backbone
from server.errors import ServiceError
from server.methods.registry import Registry
from server.training import forward_cost
from server.training.baseline_fit import reporting
from server.training.co_batching import run_alone
from server.training.compare import ComparisonInputs, ComparisonRequest, comparing
from server.training.data import Splits
from server.training.fit import FitResult, fit
from server.training.frozen import FrozenFeatures
from server.training.progress import Progress
from server.training.recipe import resolve
from server.worker.checkpoints import Checkpoints
from tests.engine.golden_cases import golden_backbone
from tests.training.test_fit import stripes

SPLITS = Splits(stripes(24, 1), stripes(12, 2), stripes(12, 3))
WISH = ComparisonRequest(("linear", "vpt_deep", "partial-1"), (0, 1), {"epochs": 2, "batch_size": 8, "prompts": 2})
TOLD_BY_A_CLOCK = ("fit_s", "cpu_s", "forward_cost")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float32)


def material(backbone: Backbone, splits: Splits = SPLITS) -> ComparisonInputs:
    return ComparisonInputs(
        lambda recipe: splits, ("a", "b", "c"), lambda fitted: packed(backbone, fitted), lambda: fresh(backbone)
    )


def fresh(backbone: Backbone) -> FrozenFeatures:
    return FrozenFeatures(backbone)


def packed(backbone: Backbone, fitted: FitResult) -> Bundle:
    spec = backbone.spec
    manifest = Manifest(
        task="stripes", method=fitted.method.name, backbone=Fingerprint(arch=spec.arch, fingerprint=spec.fingerprint),
        labels=("a", "b", "c"), prompt_lengths=fitted.prompt_lengths, preprocess=spec.preprocess, metrics={}, recipe={},
        dataset=None, parent=None, created_at=0.0, lensrack_version="0",
    )  # fmt: skip
    return Bundle.build(manifest, fitted.params)


def compared(backbone: Backbone, wish: ComparisonRequest = WISH, **rest: Any) -> dict[str, Any]:
    return run_alone(backbone, comparing(backbone, Registry(), wish, material(backbone), **rest))


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(one) for name, one in value.items() if name not in TOLD_BY_A_CLOCK}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def test_every_fit_is_the_one_that_a_job_would_make(backbone: Backbone) -> None:
    found, registry = compared(backbone), Registry()
    assert [(one["method"], one["seed"]) for one in found["fits"]] == [
        (method, seed) for seed in WISH.seeds for method in WISH.methods
    ]
    by_key = {(one["method"], one["seed"]): one for one in found["fits"]}
    deep = resolve(registry.get("vpt_deep").defaults, {**WISH.fields, "seed": 1})
    alike = fit(backbone, registry.get("vpt_deep"), SPLITS, 3, deep)
    told = by_key["vpt_deep", 1]
    assert (told["val_accuracy"], told["test_accuracy"]) == (
        alike.metrics["val_accuracy"],
        alike.metrics["test_accuracy"],
    )
    assert told["parameters"] == sum(value.size for value in alike.params.values())
    assert told["bundle_bytes"] == pytest.approx(len(packed(backbone, alike).data), rel=0.01)
    partial = registry.baseline("partial-1")
    recipe = resolve(partial.defaults, {**WISH.fields, "seed": 0})
    reported = run_alone(backbone, reporting(backbone, partial, SPLITS, 3, recipe))
    assert by_key["partial-1", 0]["test_accuracy"] == reported.metrics["test_accuracy"]
    assert by_key["linear", 0]["epochs"] == registry.get("linear").defaults["epochs"], "a head keeps its own epochs"


def test_a_row_is_the_mean_over_the_seeds_and_what_the_method_costs(backbone: Backbone) -> None:
    found = compared(backbone)
    assert found["dataset_split"] == "test"
    for row in found["rows"]:
        own = [one["test_accuracy"] for one in found["fits"] if one["method"] == row["method"]]
        assert row["test_accuracy"] == pytest.approx(sum(own) / 2, abs=1e-6)
        assert row["test_accuracy_std"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5, abs=1e-6)
    linear, deep, partial = found["rows"]
    width = backbone.spec.dim
    assert linear["lens_bytes"] == 3 * (width + 1) * 4
    assert deep["lens_bytes"] == (3 + 2 * 2 * backbone.spec.depth) * (width + 1) * 4
    assert linear["forward_cost"] > 0
    assert deep["forward_cost"] > 0
    assert (partial["servable"], partial["bundle_bytes"], partial["lens_bytes"], partial["forward_cost"]) == (
        False, None, None, None,
    )  # fmt: skip


def test_what_was_cut_goes_on_with_the_fit_that_it_was_in(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.checkpoints.EVERY_S", 0.0)
    monkeypatch.setattr("server.worker.checkpoints.REST", 0.0)

    class PowerCutError(Exception):
        pass

    def cut(progress: Progress) -> None:
        if (progress.trial, progress.epoch, progress.step) == (5, 2, 2):
            raise PowerCutError

    checkpoints, steps = Checkpoints(tmp_path), []
    with pytest.raises(PowerCutError):
        compared(backbone, on_progress=cut, on_checkpoint=checkpoints.recorder("cut"))
    left = checkpoints.read("cut")
    assert left is not None
    assert (len(left.trials), left.epoch) == (4, 1)
    assert left.spent_s > 0
    assert left.cpu_s > 0

    def note(progress: Progress) -> None:
        if progress.step:
            steps.append((progress.trial, progress.epoch))

    resumed = compared(backbone, resume=left, on_progress=note)
    assert min(steps) == (5, 2)
    assert timeless(resumed) == timeless(compared(backbone))
    assert resumed["fits"][4]["fit_s"] >= round(left.spent_s, 1)


def test_a_finished_fit_is_written_down_however_quick_it_was(backbone: Backbone, tmp_path: Path) -> None:
    checkpoints, known = Checkpoints(tmp_path), []

    def look(progress: Progress) -> None:
        if progress.trial_figures is not None:
            kept = checkpoints.read("quick")
            known.append(0 if kept is None else len(kept.trials))

    compared(
        backbone,
        ComparisonRequest(("linear",), (0, 1), {"validation": 0.2}),
        on_progress=look,
        on_checkpoint=checkpoints.recorder("quick"),
    )
    assert known == [1, 2]


def test_what_diverges_is_told_and_the_others_are_compared(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    wild = {**registry.get("vpt_deep").defaults, "optimizer": "sgd", "lr": 1e30}
    monkeypatch.setattr(type(registry.get("vpt_deep")), "defaults", wild)
    deep, linear = compared(backbone, ComparisonRequest(("vpt_deep", "linear"), (0,), {"epochs": 3}))["rows"]
    assert (deep["diverged"], deep["test_accuracy"], deep["parameters"]) == (1, None, None)
    assert linear["test_accuracy"] is not None
    assert linear["test_accuracy_std"] is None


def test_without_test_pictures_the_validation_pictures_count(backbone: Backbone) -> None:
    splits = Splits(SPLITS.train, SPLITS.val, None)
    asked = comparing(backbone, Registry(), ComparisonRequest(("linear",), (0,)), material(backbone, splits))
    assert run_alone(backbone, asked)["dataset_split"] == "val"


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        (ComparisonRequest(("linear", "vpt_deeper"), (0,)), "unknown_method"),
        (ComparisonRequest(("linear",), (0,), {"lr_": 1}), "invalid_request"),
    ],
)
def test_a_wrong_wish_is_refused_before_the_first_fit(backbone: Backbone, wish: ComparisonRequest, code: str) -> None:
    steps: list[Progress] = []
    with pytest.raises(ServiceError) as refused:
        compared(backbone, wish, on_progress=steps.append)
    assert refused.value.code == code
    assert not steps


def test_a_forward_is_measured_beside_the_plain_one(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times as told: the lens's turn takes 3 s in two rounds, 9 s once, the plain ViT's always 2."""
    monkeypatch.setattr(forward_cost, "ROUNDS", 3)
    told = iter([7.0, 1.0, 3.0, 2.0, 9.0, 2.0, 3.0, 2.0])
    monkeypatch.setattr(forward_cost, "_timed", lambda run: (run(), next(told))[1])
    found = fit(backbone, Registry().get("linear"), SPLITS, 3, resolve({}, {"epochs": 1}))
    loaded = Registry().load(packed(backbone, found), backbone)
    assert forward_cost.measure(backbone, loaded, lambda: None).forward == 1.5
