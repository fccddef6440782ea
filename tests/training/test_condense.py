"""Prompt Condensation: the scores are the literal ones, what is kept is the best of all layers, the smallest that is
good enough wins, and an interruption changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import reference
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.errors import ServiceError
from server.methods.method import Method
from server.methods.registry import METHODS, Registry
from server.training import checkpoint
from server.training.checkpoint import Checkpoint
from server.training.co_batching import Fitting, run_alone
from server.training.condense import condensable, condensing, counts, cut, refit_recipe, resumed_parent, scores
from server.training.data import LabelledImages, Splits
from server.training.fit import Fit, FitResult, fit
from server.training.frozen import FrozenFeatures
from server.training.progress import Progress
from server.training.recipe import Condense, Recipe, resolve
from tests.engine.golden_cases import Bench, golden_backbone
from tests.training.test_fit import QUICK, SPLITS

SPEC = golden_backbone("vit_nano", 101, torch.float64).spec
PROMPTED = [method for method in METHODS if condensable(method, SPEC)]
ALWAYS: dict[str, Any] = {"keep": [0.2], "epsilon": 1.0, "epochs": 1}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


def fitted(backbone: Backbone, method: str, **changes: object) -> FitResult:
    own = Registry().get(method)
    return fit(backbone, own, SPLITS, 3, resolve(own.defaults, {**QUICK, "epochs": 3, **changes}))


@pytest.fixture(scope="module")
def parent(backbone: Backbone) -> FitResult:
    return fitted(backbone, "vpt_deep")


def asked(parent: FitResult, **how: object) -> FitResult:
    return replace(parent, recipe=replace(parent.recipe, condense=Condense.parse({**ALWAYS, **how})))


def condensed(backbone: Backbone, parent: FitResult, **rest: Any) -> FitResult:
    return run_alone(backbone, condensing(backbone, parent, SPLITS, 3, **rest))


def scored(backbone: Backbone, parent: FitResult, pictures: LabelledImages) -> torch.Tensor:
    def asking() -> Fitting[torch.Tensor]:
        run = Fit(backbone, parent.method, parent.recipe, parent.prompt_lengths, FrozenFeatures(backbone))
        yield from run.begin(pictures, 3, parent, None)
        return (yield from scores(run, (yield from run.inputs(pictures))))

    return run_alone(backbone, asking())


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "cvpt"])
def test_scores_are_the_literal_ones(backbone: Backbone, method: str) -> None:
    """Picture by picture, through the reference, in float64."""
    parent = fitted(backbone, method, epochs=1, batch_size=4)
    pictures, own = SPLITS.train.take(np.arange(6)), backbone.spec.preprocess
    params = {name: torch.from_numpy(value).double() for name, value in parent.params.items()}
    pixels = torch.from_numpy(pictures.images.read(np.arange(6))).double() / 255
    pixels = ((pixels - torch.tensor(own.mean)) / torch.tensor(own.std)).permute(0, 3, 1, 2)
    literal = torch.zeros(sum(parent.prompt_lengths), dtype=torch.float64)
    for picture, target in zip(pixels, pictures.targets, strict=True):
        prompts = params["prompts"].clone().requires_grad_(True)
        logits = reference.logits(
            method, backbone, picture[None], {**params, "prompts": prompts}, parent.prompt_lengths
        )
        F.cross_entropy(logits.float(), torch.tensor([target])).backward()
        literal += (prompts.grad * prompts.detach()).sum(-1).abs() / 6
    torch.testing.assert_close(
        scored(backbone, parent, pictures), literal, rtol=1e-4, atol=1e-7
    )  # the loss is taken in float32
    assert literal.min() > 0


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_what_is_kept_is_the_best_of_all_layers(data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)))
    score = data.draw(st.lists(st.floats(0, 9), min_size=sum(lengths), max_size=sum(lengths)))
    count = data.draw(st.integers(1, sum(lengths)))
    prompts = np.arange(sum(lengths), dtype=np.float32)[:, None]
    whole = FitResult(Registry().get("vpt_deep"), Recipe(), {"prompts": prompts}, lengths, {})
    found = cut(whole, torch.tensor(score, dtype=torch.float64), count)
    kept = found.params["prompts"][:, 0].astype(int).tolist()
    assert kept == sorted(kept), "in their order"
    assert len(kept) == count == sum(found.prompt_lengths)
    left = [one for number, one in enumerate(score) if number not in kept]
    assert min(score[number] for number in kept) >= max(left, default=0)
    layer_of = np.repeat(np.arange(len(lengths)), lengths)
    assert found.prompt_lengths == tuple(np.bincount(layer_of[kept], minlength=len(lengths)))


def test_how_many_are_tried() -> None:
    assert counts(120, (0.1, 0.2, 0.5)) == [12, 24, 60]
    assert counts(12, (0.01, 0.05, 0.1, 0.99)) == [1], "never none, never all, none twice"
    assert counts(1, (0.5,)) == []


def test_the_refit_is_the_same_schedule_in_less_time() -> None:
    recipe = resolve({}, {"epochs": 20, "warmup_epochs": 4, "patience": 3, "init": "tokens", "condense": True})
    short = refit_recipe(recipe)
    assert (short.epochs, short.warmup_epochs, short.patience, short.init) == (12, 2.4, 0, "uniform")
    assert refit_recipe(resolve({}, {"epochs": 2, "condense": {"epochs": 7}})).epochs == 7


@pytest.mark.parametrize("method", PROMPTED, ids=lambda method: method.name)
def test_what_is_left_is_served_as_it_was_judged(method: Method) -> None:
    """Ragged lengths, also 0, through the rack: the accuracy told is the accuracy served."""
    backbone = golden_backbone("vit_nano", 101, torch.float32)
    parent = asked(fitted(backbone, method.name, prompts=5), keep=[0.25])
    found = condensed(backbone, parent)
    assert sum(found.prompt_lengths) == found.metrics["condense"]["kept"] == round(sum(parent.prompt_lengths) / 4)
    assert found.params["prompts"].shape[0] == sum(found.prompt_lengths)
    assert found.recipe == parent.recipe
    params = {name: torch.from_numpy(value) for name, value in found.params.items()}
    with torch.inference_mode():
        lens = method.lower(backbone, params, found.prompt_lengths)
    bench, own = Bench(backbone), backbone.spec.preprocess
    seat = bench.seat(lens, own.mean[0], own.std[0])
    rows = Engine(backbone, bench.rack).run([(image, seat) for image in SPLITS.val.images.read(np.arange(30))])
    right = np.mean([row.argmax() for row in rows] == SPLITS.val.targets)
    assert right == pytest.approx(found.metrics["val_accuracy"], abs=1e-6)


def test_the_smallest_that_is_good_enough_wins(backbone: Backbone, parent: FitResult) -> None:
    found = condensed(backbone, asked(parent, keep=[0.5, 0.1, 0.3], epsilon=0.1, epochs=3))
    told = found.metrics["condense"]
    tried = [one["kept"] for one in told["sweep"]]
    assert tried == [2, 5, 8][: len(tried)]
    lost = [told["val_accuracy"] - one["val_accuracy"] for one in told["sweep"]]
    assert all(one > 0.1 for one in lost[:-1])
    assert lost[-1] <= 0.1
    assert told["kept"] == tried[-1] == sum(found.prompt_lengths)
    assert found.metrics["val_accuracy"] == told["sweep"][-1]["val_accuracy"]
    assert told["val_accuracy"] == parent.metrics["val_accuracy"]
    assert [len(layer) for layer in told["scores"]] == list(parent.prompt_lengths)


def test_where_none_is_good_enough_the_parent_stays(backbone: Backbone, parent: FitResult) -> None:
    spoilt = asked(parent, keep=[0.1, 0.5], epsilon=0.0)
    rate = replace(spoilt.recipe, lr=1e30, optimizer="sgd")  # whatever is refitted diverges
    found = condensed(backbone, replace(spoilt, recipe=rate))
    told = found.metrics["condense"]
    assert told["kept"] is None
    assert [(one["kept"], one["val_accuracy"]) for one in told["sweep"]] == [(2, None), (8, None)]
    assert found.prompt_lengths == parent.prompt_lengths
    for name, value in parent.params.items():
        np.testing.assert_array_equal(value, found.params[name])


def test_chosen_prompts_are_better_than_random_ones(backbone: Backbone, parent: FitResult) -> None:
    """Before any refit, the best quarter keeps more of the fitted loss than the worst quarter."""

    def nll(start: FitResult) -> float:
        def asking() -> Fitting[np.ndarray]:
            run = Fit(backbone, start.method, start.recipe, start.prompt_lengths, FrozenFeatures(backbone))
            yield from run.begin(SPLITS.train, 3, start, None)
            return (yield from run.logits((yield from run.inputs(SPLITS.train))))

        logits = torch.from_numpy(run_alone(backbone, asking()))
        return float(F.cross_entropy(logits, torch.from_numpy(SPLITS.train.targets)))

    score = scored(backbone, parent, SPLITS.train)
    whole = nll(parent)
    assert abs(nll(cut(parent, score, 8)) - whole) < abs(nll(cut(parent, -score, 8)) - whole)


@pytest.mark.parametrize("when", [(1, 1), (2, 2)], ids=["in the first refit", "in the second"])
def test_an_interrupted_condensation_that_is_resumed_ends_with_the_same_bits(
    backbone: Backbone, parent: FitResult, when: tuple[int, int], tmp_path: Path
) -> None:
    class PowerCutError(Exception):
        pass

    def cut_off(progress: Progress) -> None:
        if (progress.trial, progress.epoch, progress.step) == (when[0], 2, when[1]):
            raise PowerCutError

    again = asked(parent, keep=[0.1, 0.2], epsilon=-1.0, epochs=3)  # none is ever good enough
    again = replace(again, recipe=replace(again.recipe, lr=1e-4, prompt_dropout=0.2))
    undisturbed, file = condensed(backbone, again), tmp_path / "job.safetensors"
    assert len(undisturbed.metrics["condense"]["sweep"]) == 2
    with pytest.raises(PowerCutError):
        condensed(backbone, again, on_progress=cut_off, on_checkpoint=lambda state: checkpoint.write(file, state))
    state = checkpoint.read(file)
    assert state is not None
    assert (state.epoch, len(state.condense["told"]["sweep"])) == (1, when[0] - 1)
    started = resumed_parent(state, Registry().get)
    assert started is not None
    assert (started.recipe, started.prompt_lengths) == (again.recipe, again.prompt_lengths)
    steps: list[tuple[int, int]] = []

    def note(now: Progress) -> None:
        if now.step:
            steps.append((now.trial, now.epoch))

    resumed = condensed(backbone, started, resume=state, on_progress=note)
    assert min(steps) == (when[0], 2), "nothing is done twice"
    for name, value in undisturbed.params.items():
        np.testing.assert_array_equal(value, resumed.params[name])
    assert undisturbed.metrics == resumed.metrics


def test_a_checkpoint_of_a_fit_is_none_of_a_condensation(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "fit", Checkpoint(epoch=2))
    assert resumed_parent(checkpoint.read(tmp_path / "fit"), Registry().get) is None
    assert resumed_parent(None, Registry().get) is None


def test_what_cannot_be_condensed_is_refused(backbone: Backbone, parent: FitResult) -> None:
    assert {method.name for method in PROMPTED} == {"vpt_deep", "vpt_shallow", "cvpt", "prompt_bias"}
    for name in ("linear", "readonly"):  # a reader's other parameters go with a layer's last prompt
        with pytest.raises(ServiceError, match=f"prompts can go one by one, got {name}"):
            condensed(backbone, asked(replace(parent, method=Registry().get(name))))
    with pytest.raises(ServiceError, match="expected some prompts, got a fit with none"):
        condensed(backbone, asked(fitted(backbone, "vpt_deep", prompts=0, epochs=1)))
    for wrong in ({"keep": [0.0]}, {"keep": [1.0]}, {"keep": []}, {"share": 0.1}, 3):
        with pytest.raises(ServiceError, match="condense: expected"):
            resolve({}, {"condense": wrong})


def test_progress_tells_every_count(backbone: Backbone, parent: FitResult) -> None:
    seen: list[Progress] = []
    found = condensed(backbone, asked(parent, keep=[0.1, 0.5]), on_progress=seen.append)
    tried = [progress.trial_figures for progress in seen if progress.trial_figures]
    assert [one["kept"] for one in tried] == [one["kept"] for one in found.metrics["condense"]["sweep"]]
    assert {progress.trials for progress in seen} == {2}
    assert not any(progress.epoch_ended for progress in seen)


def test_what_cannot_be_seen_of_the_test_pictures(backbone: Backbone, parent: FitResult) -> None:
    """Nothing is chosen by them: with others the same prompts are kept."""
    others = Splits(SPLITS.train, SPLITS.val, SPLITS.test.take(np.arange(3)) if SPLITS.test else None)
    one = condensed(backbone, asked(parent))
    other = run_alone(backbone, condensing(backbone, asked(parent), others, 3))
    np.testing.assert_array_equal(one.params["prompts"], other.params["prompts"])
