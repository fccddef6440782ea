"""Baselines: they begin where the backbone stands, learn as a plain loop would, and leave it alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.lens import Plain
from server.errors import ServiceError
from server.methods.baseline import Baseline
from server.methods.partial import Partial
from server.methods.registry import BASELINES, Registry
from server.training import baseline_fit, checkpoint, co_batching, frozen
from server.training.baseline_fit import BaselineResult, reporting
from server.training.co_batching import run_alone
from server.training.data import Splits
from server.training.fit import DivergedError, FitResult, fitting, seeded
from server.training.progress import Progress
from server.training.recipe import resolve
from tests.engine.golden_cases import golden_backbone
from tests.training.test_fit import QUICK, stripes

SPLITS = Splits(stripes(24, 1), stripes(12, 2), stripes(12, 3))
QUICKER = {**QUICK, "epochs": 3, "lr": 2e-3, "batch_size": 8}
each_baseline = pytest.mark.parametrize("baseline", BASELINES, ids=lambda one: one.name)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


@pytest.fixture(scope="module")
def quick_eye() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float32)


def reported(
    backbone: Backbone, baseline: Baseline, rest: dict[str, Any] | None = None, **changes: object
) -> BaselineResult:
    recipe = resolve(baseline.defaults, {**QUICKER, **changes})
    return run_alone(backbone, reporting(backbone, baseline, SPLITS, 3, recipe, **(rest or {})))


def normalised(backbone: Backbone, count: int) -> torch.Tensor:
    own = backbone.spec.preprocess
    pixels = torch.from_numpy(SPLITS.val.images.read(np.arange(count))).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(value).double()[:, None, None] for value in (own.mean, own.std))
    return (pixels - mean) / std


@each_baseline
def test_it_begins_where_the_backbone_stands(backbone: Backbone, baseline: Baseline) -> None:
    """The same feature in float64, through the network that will be changed and through the engine's forward."""
    model, pixels = baseline.model(backbone, 3, seeded(0, 0)), normalised(backbone, 6)
    x, layer = vit.embed(backbone, pixels), baseline.first_layer(backbone.spec)
    with torch.no_grad():
        feature = vit.forward(backbone, x, Plain())
        given = feature if layer == backbone.spec.depth else vit.tokens_at(backbone, x, layer) if layer else None
        expected = model.head(feature)
        if baseline.name == "side":
            beside = model.projection(model.features(pixels).flatten(1))
            expected = model.head(0.5 * feature + 0.5 * beside)
        found = model(pixels if baseline.sees_pixels else None, given)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("blocks", [1, 2])
def test_partial_moves_as_many_parameters_as_the_paper_counts(backbone: Backbone, blocks: int) -> None:
    """12·D² + 13·D a block and 2·D for the norm: 7,089,408 and 14,177,280 where D is 768."""
    D, C = backbone.spec.dim, 3
    own = Partial(blocks).model(backbone, C, seeded(0, 0)).trained()
    assert sum(value.numel() for value in own.values()) == blocks * (12 * D * D + 13 * D) + 2 * D + (D + 1) * C
    assert [blocks * (12 * 768**2 + 13 * 768) + 2 * 768 for blocks in (1, 2)] == [7_089_408, 14_177_280]


def test_full_moves_every_weight(backbone: Backbone) -> None:
    own = Registry().baseline("full").model(backbone, 3, seeded(0, 0)).trained()
    whole = sum(value.numel() for value in backbone.model.parameters())
    assert sum(value.numel() for value in own.values()) == whole + (backbone.spec.dim + 1) * 3


@each_baseline
def test_it_learns_and_the_backbone_stays_as_it_was(quick_eye: Backbone, baseline: Baseline) -> None:
    backbone = quick_eye
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    found = reported(backbone, baseline, epochs=5)
    curve = found.metrics["curve"]["loss"]
    assert curve[-1] < 0.8 * curve[0]
    assert {"val_accuracy", "test_accuracy", "forward_passes", "temperature"} <= found.metrics.keys()
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_full_is_what_a_plain_loop_makes_of_timms_model(backbone: Backbone) -> None:
    """One epoch, written out: whole batches, timm's own forward, PyTorch's AdamW."""
    recipe = resolve(Registry().baseline("full").defaults, {**QUICKER, "epochs": 1, "warmup_epochs": 0})
    kept: list[checkpoint.Checkpoint] = []
    run_alone(backbone, reporting(backbone, Registry().baseline("full"), SPLITS, 3, recipe, on_checkpoint=kept.append))
    model, generator = copy.deepcopy(backbone.model).requires_grad_(True), seeded(recipe.seed, 1)
    head = Registry().baseline("full").model(backbone, 3, seeded(recipe.seed, 0)).head
    moving = [*model.parameters(), head.weight]
    groups = [{"params": moving}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    own, count = backbone.spec.preprocess, len(SPLITS.train)
    pixels = torch.from_numpy(SPLITS.train.images.read(np.arange(count))).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(value).double()[:, None, None] for value in (own.mean, own.std))
    batches = torch.randperm(count, generator=generator).split(recipe.batch_size)
    for step, index in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + np.cos(np.pi * step / len(batches)))
        optimizer.zero_grad()
        features = model.forward_head(model.forward_features((pixels[index] - mean) / std), pre_logits=True)
        F.cross_entropy(head(features), torch.from_numpy(SPLITS.train.targets[index.numpy()])).backward()
        optimizer.step()
    found = kept[0].params
    assert torch.allclose(found["head.weight"], head.weight, rtol=0, atol=1e-9)
    for name, value in model.named_parameters():
        assert torch.allclose(found[f"backbone.{name}"], value, rtol=0, atol=1e-8), name


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_few_pictures_at_a_time_make_the_same_step(
    backbone: Backbone, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, changes = Registry().baseline("partial-1"), {"class_weights": weights, "label_smoothing": 0.1, "epochs": 2}
    whole = reported(backbone, own, **changes)
    monkeypatch.setattr(baseline_fit, "MICRO", 3)
    parts = reported(backbone, own, **changes)
    np.testing.assert_allclose(parts.metrics["curve"]["loss"], whole.metrics["curve"]["loss"], atol=2e-5)
    assert parts.metrics["val"]["nll"] == pytest.approx(whole.metrics["val"]["nll"], abs=1e-6)


@pytest.mark.parametrize("name", ["partial-1", "side"])
def test_what_is_frozen_is_the_same_computed_once_or_each_time(
    quick_eye: Backbone, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, own = quick_eye, Registry().baseline(name)
    once = reported(backbone, own, epochs=2)
    monkeypatch.setattr(frozen.FrozenFeatures, "fits", lambda *_: False)
    each = reported(backbone, own, epochs=2)
    np.testing.assert_allclose(each.metrics["curve"]["loss"], once.metrics["curve"]["loss"], atol=2e-5)


@each_baseline
def test_an_interrupted_fit_that_is_resumed_ends_with_the_same_figures(
    quick_eye: Backbone, baseline: Baseline, tmp_path: Path
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: Progress) -> None:
        if progress.epoch == 2 and progress.step == 2:
            raise PowerCutError

    backbone, file, steps = quick_eye, tmp_path / "job.safetensors", []
    undisturbed = reported(backbone, baseline, {"on_checkpoint": lambda state: None}, patience=3, augment="flip")
    keep = {"on_progress": cut, "on_checkpoint": lambda state: checkpoint.write(file, state)}
    with pytest.raises(PowerCutError):
        reported(backbone, baseline, keep, patience=3, augment="flip")
    again = {
        "resume": checkpoint.read(file),
        "on_progress": lambda now: steps.append(now.epoch if now.step else 9),
    }
    resumed = reported(backbone, baseline, again, patience=3, augment="flip")
    assert min(steps) == 2
    assert resumed.metrics == undisturbed.metrics


def test_it_takes_turns_with_the_others_of_its_group(backbone: Backbone) -> None:
    """A baseline, a method and a baseline that diverges: each ends as it would have ended by itself."""
    full, deep = Registry().baseline("full"), Registry().get("vpt_deep")
    quick, wild = resolve(full.defaults, {**QUICKER, "epochs": 2}), {"optimizer": "sgd", "lr": 1e30, "epochs": 2}
    asked = resolve(deep.defaults, {**QUICK, "epochs": 2})
    seen: list[str] = []
    found = co_batching.run(
        backbone,
        [
            reporting(backbone, full, SPLITS, 3, quick, on_progress=lambda _: seen.append("full")),
            fitting(backbone, deep, SPLITS, 3, asked, on_progress=lambda _: seen.append("deep")),
            reporting(backbone, full, SPLITS, 3, resolve(full.defaults, {**QUICKER, **wild})),
        ],
    )
    assert isinstance(found[0], BaselineResult)
    assert isinstance(found[1], FitResult)
    assert isinstance(found[2], DivergedError)
    assert found[0].metrics == reported(backbone, full, epochs=2).metrics
    assert seen.index("full") < len(seen) - 1 - seen[::-1].index("deep")
    assert seen.index("deep") < len(seen) - 1 - seen[::-1].index("full"), "one went to its end before the other began"


@each_baseline
def test_whoever_asks_to_serve_it_is_told_why_not(baseline: Baseline) -> None:
    with pytest.raises(ServiceError) as refused:
        Registry().get(baseline.name)
    assert (refused.value.status, refused.value.code) == (422, "method_not_servable")
    assert baseline.why in refused.value.detail
    assert Registry().fittable(baseline.name) is baseline
