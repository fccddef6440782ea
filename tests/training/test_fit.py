"""Fitting: it learns, repeats itself, can be stopped, says when it diverges, and leaves the backbone as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.errors import ServiceError
from server.methods.registry import Registry
from server.training import checkpoint, frozen
from server.training.data import InMemory, LabelledImages, Splits, hold_out
from server.training.fit import DivergedError, Fit, FitResult, fit
from server.training.optimizer import lr_scale
from server.training.progress import Progress
from server.training.recipe import Recipe, resolve
from tests.engine.golden_cases import Bench, golden_backbone

METHODS = ["vpt_deep", "vpt_shallow", "linear", "mlp", "bias", "prompt_bias", "cvpt", "lora", "adapter", "memory"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float32)


def stripes(n: int, seed: int) -> LabelledImages:
    """Three classes of stripes: along one side, along the other, and none."""
    generator = np.random.default_rng(seed)
    images = generator.integers(60, 120, (n, 64, 64, 3)).astype(np.uint8)
    targets = np.arange(n) % 3
    phase = generator.integers(0, 8, n)
    for index, (target, shift) in enumerate(zip(targets, phase, strict=True)):
        wave = (90 * (np.sin((np.arange(64) + shift) / 3) > 0)).astype(np.uint8)
        images[index] += wave[:, None, None] if target == 0 else wave[None, :, None] if target == 1 else 45
    return LabelledImages(InMemory(images), targets.astype(np.int64))


SPLITS = Splits(stripes(60, 1), stripes(30, 2), stripes(30, 3))
QUICK = {"epochs": 6, "batch_size": 20, "warmup_epochs": 1, "prompts": 4, "lr": 1e-2}


def fitted(backbone: Backbone, method: str, **changes: object) -> FitResult:
    own = Registry().get(method)
    return fit(backbone, own, SPLITS, 3, resolve(own.defaults, {**QUICK, **changes}))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_it_learns(backbone: Backbone, method: str, optimizer: str) -> None:
    found = fitted(backbone, method, optimizer=optimizer, **({"lr": 0.05} if optimizer == "sgd" else {}))
    curve = found.metrics["curve"]["loss"]
    assert curve[-1] < 0.7 * curve[0]
    assert found.metrics["val_accuracy"] >= 0.8
    assert found.metrics["test_accuracy"] >= 0.8


@pytest.mark.parametrize("method", METHODS)
def test_the_served_answers_are_those_that_were_fitted(backbone: Backbone, method: str) -> None:
    """The accuracy in the manifest is the accuracy of the lens on the rack."""
    found, bench = fitted(backbone, method), Bench(backbone)
    params = {name: torch.from_numpy(value) for name, value in found.params.items()}
    with torch.inference_mode():
        lens = Registry().get(method).lower(backbone, params, found.prompt_lengths)
    own = backbone.spec.preprocess
    seat = bench.seat(lens, own.mean[0], own.std[0])
    rows = Engine(backbone, bench.rack).run([(image, seat) for image in SPLITS.val.images.read(np.arange(30))])
    right = np.mean([row.argmax() for row in rows] == SPLITS.val.targets)
    assert right == pytest.approx(found.metrics["val_accuracy"], abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(backbone: Backbone, method: str) -> None:
    first, second, other = (fitted(backbone, method, seed=seed, prompt_dropout=0.2) for seed in (5, 5, 6))
    for name, value in first.params.items():
        np.testing.assert_array_equal(value, second.params[name])
    assert any((value != other.params[name]).any() for name, value in first.params.items())
    assert first.metrics == second.metrics


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_fit_that_is_resumed_ends_with_the_same_bits(
    backbone: Backbone, method: str, optimizer: str, tmp_path: Path
) -> None:
    """Killed in the middle of the fourth epoch: nothing tells the outcome from an undisturbed fit's."""

    class PowerCutError(Exception):
        pass

    def cut(progress: Progress) -> None:
        if progress.epoch == 4 and progress.step == 2:
            raise PowerCutError

    own, file = Registry().get(method), tmp_path / "job.safetensors"
    recipe = resolve(own.defaults, {**QUICK, "optimizer": optimizer, "prompt_dropout": 0.2})
    undisturbed = fit(backbone, own, SPLITS, 3, recipe)
    with pytest.raises(PowerCutError):
        fit(
            backbone, own, SPLITS, 3, recipe, on_progress=cut, on_checkpoint=lambda state: checkpoint.write(file, state)
        )
    found = checkpoint.read(file)
    assert found is not None
    assert found.epoch == 3
    epochs: list[int] = []

    def note(progress: Progress) -> None:
        if progress.step:
            epochs.append(progress.epoch)

    resumed = fit(backbone, own, SPLITS, 3, recipe, resume=found, on_progress=note)
    assert min(epochs) == 4
    for name, value in undisturbed.params.items():
        np.testing.assert_array_equal(value, resumed.params[name])
    assert undisturbed.metrics == resumed.metrics


def test_a_checkpoint_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert checkpoint.read(tmp_path / "nothing") is None
    (tmp_path / "half").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert checkpoint.read(tmp_path / "half") is None


def test_the_backbone_stays_as_it_was(backbone: Backbone) -> None:
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    fitted(backbone, "vpt_deep", epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_whoever_watches_sees_every_step_and_can_end_it(backbone: Backbone) -> None:
    class EnoughError(Exception):
        pass

    seen: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 6:
            raise EnoughError

    own = Registry().get("vpt_deep")
    with pytest.raises(EnoughError):
        fit(backbone, own, SPLITS, 3, resolve(own.defaults, QUICK), on_progress=on_progress)
    assert [(p.epoch, p.step, p.epoch_ended) for p in seen] == [
        (1, 1, False), (1, 2, False), (1, 3, False), (1, 3, False), (1, 3, True), (2, 1, False),
    ]  # fmt: skip  # the fourth: a batch of the validation pictures
    assert seen[4].val_accuracy is not None
    assert seen[0].eta_s is None
    assert seen[5].eta_s is not None


def test_divergence_is_an_error_that_says_what_to_try(backbone: Backbone) -> None:
    with pytest.raises(DivergedError, match="smaller learning rate than 1e\\+30"):
        fitted(backbone, "vpt_deep", optimizer="sgd", lr=1e30)


def test_the_schedule_warms_up_and_cools_down() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=2)
    assert lr_scale(recipe, 0) == 0
    assert lr_scale(recipe, 1) == 0.5
    assert lr_scale(recipe, 2) == 1
    assert lr_scale(recipe, 6) == pytest.approx(0.5)
    assert lr_scale(recipe, 10) == pytest.approx(0)
    assert lr_scale(Recipe(epochs=1, warmup_epochs=0), 0.5) == pytest.approx(0.5)


def test_a_recipe_is_defaults_then_the_methods_then_the_jobs() -> None:
    assert resolve({"lr": 0.5}, {"epochs": 7, "lr": None}) == Recipe(lr=0.5, epochs=7)
    assert resolve({}, {"base_lr": 2.5, "batch_size": 64}).lr == pytest.approx(2.5 * 64 / 256)
    assert resolve({}, {"epochs": 1}).warmup_epochs == 0
    assert resolve({"prompt_dropout": 0.1}, {"preset": "vpt", "weight_decay": 0.0}) == Recipe(
        epochs=100, batch_size=64, optimizer="sgd", lr=0.25, weight_decay=0.0, warmup_epochs=10, prompt_dropout=0.1
    )
    assert resolve({}, {"preset": "vpt", "lr": 0.7}).lr == 0.7
    assert resolve({}, {"preset": "cvpt", "base_lr": 0.8}).lr == pytest.approx(0.1)
    for wrong in ({"lr": 1, "base_lr": 1}, {"sped": 3}, {"optimizer": "adagrad"}):
        with pytest.raises(ServiceError):
            resolve({}, wrong)


def test_holding_out_is_by_class_seeded_and_never_takes_the_last() -> None:
    pictures = LabelledImages(InMemory(np.zeros((12, 1, 1, 3), np.uint8)), np.array([0] * 8 + [1] * 2 + [2] * 2))
    train, val = hold_out(pictures, 0.25, seed=1)
    assert [int((val.targets == target).sum()) for target in range(3)] == [2, 1, 1]
    assert [int((train.targets == target).sum()) for target in range(3)] == [6, 1, 1]


@pytest.mark.parametrize("layers", [(1, 1), (1, 2), (2, 2)])
def test_what_lies_before_the_first_prompt_is_computed_once_and_changes_nothing(
    layers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in later layers only (VPT, prompt depth): the same fit with what lies before kept or not."""
    backbone = golden_backbone("vit_nano", 101, torch.float64)
    asked: list[tuple[int, int | None]] = []
    forward, begin = vit.forward_lanes, vit.tokens_at

    def forwarded(backbone: Backbone, lanes: Sequence[vit.Lane]) -> list[torch.Tensor]:
        asked.extend((lane.start, None) for lane in lanes)
        return forward(backbone, lanes)

    def begun(backbone: Backbone, x: torch.Tensor, layer: int, start: int = 0) -> torch.Tensor:
        asked.append((start, layer))
        return begin(backbone, x, layer, start)

    monkeypatch.setattr(vit, "forward_lanes", forwarded)
    monkeypatch.setattr(vit, "tokens_at", begun)
    kept = fitted(backbone, "vpt_deep", prompt_layers=layers, prompt_dropout=0.2, epochs=3)
    assert {start for start, until in asked if until is None} == {layers[0]}
    assert sum(until == layers[0] for _, until in asked) == 3, "once for each split, in one batch each"
    asked.clear()
    monkeypatch.setattr(frozen, "MOST_BYTES", 0)
    again = fitted(backbone, "vpt_deep", prompt_layers=layers, prompt_dropout=0.2, epochs=3)
    assert {start for start, _ in asked} == {0}
    assert kept.prompt_lengths == again.prompt_lengths == tuple(4 * (layers[0] <= i <= layers[1]) for i in range(4))
    assert kept.metrics["forward_passes"] == again.metrics["forward_passes"]
    for name, value in kept.params.items():
        np.testing.assert_allclose(value, again.params[name], rtol=1e-6, atol=1e-8)


def test_prompt_dropout_is_each_samples_own(backbone: Backbone) -> None:
    """As the official VPT code, which drops from the prompts expanded to the batch: kept values are scaled up, every
    row loses others, and the prompts' gradient is that of what was kept."""
    recipe = resolve({}, {**QUICK, "prompt_dropout": 0.25})
    run = Fit(backbone, Registry().get("vpt_deep"), recipe, (3,) * 4, frozen.FrozenFeatures(backbone))
    prompts = torch.randn(12, 64, requires_grad=True)
    run.params = {"prompts": prompts}
    dropped = run._drop_prompts(200, torch.Generator().manual_seed(1))["prompts"]
    assert dropped.shape == (200, 12, 64)
    kept = dropped != 0
    torch.testing.assert_close(dropped, prompts.expand_as(dropped) / 0.75 * kept)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(kept[0], kept[1])
    dropped.sum().backward()
    torch.testing.assert_close(prompts.grad, kept.sum(0) / 0.75)


def test_layers_without_any_prompt_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ServiceError, match="prompt_layers 1 to 2 hold no prompt: vpt_shallow has them in layers"):
        fitted(backbone, "vpt_shallow", prompt_layers=[1, 2])
    with pytest.raises(ServiceError, match="0 <= first <= last"):
        fitted(backbone, "vpt_deep", prompt_layers=[2, 1])


def test_patience_ends_a_fit_and_keeps_its_best_epoch(backbone: Backbone) -> None:
    """Far too large a learning rate after a good start: the validation loss turns, the fit ends, the best is kept."""
    found = fitted(backbone, "vpt_deep", epochs=40, patience=3, lr=0.05, warmup_epochs=0)
    losses = found.metrics["curve"]["val_nll"]
    assert len(losses) < 40
    assert found.metrics["best_epoch"] == 1 + int(np.argmin(losses)) == len(losses) - 3
    best = found.metrics["curve"]["val_accuracy"][found.metrics["best_epoch"] - 1]
    assert found.metrics["val_accuracy"] == pytest.approx(best, abs=1e-5)


def test_a_fit_that_ends_worse_keeps_its_best_epoch_and_resumes_to_the_same_bits(
    backbone: Backbone, tmp_path: Path
) -> None:
    """Without patience, too: a fit may not end ten points below its own best epoch."""
    method = Registry().get("linear")
    recipe = resolve(method.defaults, {"epochs": 20, "lr": 0.1, "batch_size": 20})
    noisy = replace(SPLITS.train, targets=np.where(np.arange(60) % 5 < 2, 0, SPLITS.train.targets))
    splits = replace(SPLITS, train=noisy)  # learned by heart in the end

    def keep(state: checkpoint.Checkpoint) -> None:
        checkpoint.write(tmp_path / f"{state.epoch}", state)

    found = fit(backbone, method, splits, 3, recipe, on_checkpoint=keep)
    losses, best = found.metrics["curve"]["val_nll"], found.metrics["best_epoch"]
    assert best == 1 + int(np.argmin(losses)) < len(losses) == 20, "this test is about a fit that ends worse"
    assert found.metrics["val_accuracy"] == pytest.approx(found.metrics["curve"]["val_accuracy"][best - 1], abs=1e-5)
    again = fit(backbone, method, splits, 3, recipe, resume=checkpoint.read(tmp_path / f"{best + 1}"))
    assert again.metrics == found.metrics
    assert all((again.params[name] == value).all() for name, value in found.params.items())


def test_balanced_weights_make_a_rare_class_count(backbone: Backbone) -> None:
    rare = np.concatenate([np.flatnonzero(SPLITS.train.targets != 2), np.flatnonzero(SPLITS.train.targets == 2)[:2]])
    splits = Splits(SPLITS.train.take(rare), SPLITS.val, None)
    own = Registry().get("linear")
    macro = {}
    for weights in ("none", "balanced"):
        recipe = resolve(own.defaults, {"epochs": 15, "class_weights": weights, "lr": 1e-3})
        macro[weights] = fit(backbone, own, splits, 3, recipe).metrics["val"]["per_class"][2]
    assert macro["balanced"] > macro["none"]


def test_features_of_packed_and_plain_weights_are_kept_apart() -> None:
    """They agree to rounding, not to the bit, and a resumed fit promises bits."""
    images = InMemory(np.zeros((4, 64, 64, 3), np.uint8), digest="pictures")
    model = golden_backbone("vit_nano", 101, torch.float32).model
    backbones = [Backbone.of("vit_nano", model, packed=packed) for packed in (True, False)]
    if not backbones[0].packed:
        pytest.skip("this build of torch packs no weights")
    packed, plain = (frozen.FrozenFeatures(backbone)._key(images, "pooled") for backbone in backbones)
    assert packed is not None
    assert packed != plain
