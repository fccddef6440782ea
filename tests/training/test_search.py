"""The search: within its budget, repeatable, resumable, and it finds what is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.backbone import Backbone
from server.methods.method import Method
from server.methods.registry import Registry
from server.methods.vpt_deep import VptDeep
from server.training import checkpoint, search
from server.training.checkpoint import Checkpoint
from server.training.co_batching import run_alone
from server.training.data import Splits, sample
from server.training.fit import FitResult
from server.training.progress import Progress
from server.training.recipe import Recipe
from server.training.search import searching
from tests.engine.golden_cases import golden_backbone
from tests.training.test_fit import SPLITS, stripes

ALL = ("linear", "vpt_deep", "vpt_shallow")
SHORT = {"epochs": 6, "batch_size": 20, "prompts": 4}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float32)


def searched(backbone: Backbone, methods: tuple[str, ...] = ALL, **rest: Any) -> FitResult:
    own = [Registry().get(name) for name in methods]
    fixed = rest.pop("fixed", SHORT)
    return run_alone(backbone, searching(backbone, own, SPLITS, 3, fixed, **{"budget": 2000, **rest}))


@pytest.fixture(scope="module")
def found(backbone: Backbone) -> FitResult:
    return searched(backbone)


def test_it_finds_a_recipe_that_learns(found: FitResult) -> None:
    assert found.metrics["val_accuracy"] >= 0.9
    assert found.metrics["test_accuracy"] >= 0.9


def test_what_was_tried_is_told(found: FitResult) -> None:
    told = found.metrics["search"]
    rungs = [trial["rung"] for trial in told["trials"]]
    assert rungs == sorted(rungs)
    assert {trial["method"] for trial in told["trials"]} == set(ALL)
    going_on = {trial["method"] for trial in told["trials"] if trial["rung"] == 2}
    assert going_on == {"vpt_deep", "vpt_shallow"}, "what starts slowly is not dropped for what starts fast"
    assert all(trial["val_nll"] > 0 for trial in told["trials"])
    rung = 0 if found.method.name == "linear" else 2
    best = min((trial for trial in told["trials"] if trial["rung"] == rung), key=lambda trial: trial["val_nll"])
    assert (found.method.name, found.recipe.lr) == (best["method"], best["lr"])
    assert told["trials"][told["chosen"] - 1] == best
    assert best["weight_decay"] == found.recipe.weight_decay


@pytest.mark.parametrize("budget", [400, 1000, 5000])
def test_the_budget_is_kept(backbone: Backbone, budget: int) -> None:
    told = searched(backbone, budget=budget).metrics["search"]
    assert told["forward_passes"] <= 1.1 * budget  # a trial runs for whole epochs
    assert told["budget"] == budget


def test_the_same_seed_finds_the_same(backbone: Backbone, found: FitResult) -> None:
    again = searched(backbone)
    assert again.metrics == found.metrics
    for name, value in found.params.items():
        np.testing.assert_array_equal(value, again.params[name])


def test_the_best_of_each_method_goes_on_and_then_the_next_best() -> None:
    deep, shallow = (Registry().get(name) for name in ("vpt_deep", "vpt_shallow"))
    ranked = [search.Candidate(shallow, Recipe(lr=lr)) for lr in (0.1, 0.2, 0.3)]
    ranked += [search.Candidate(deep, Recipe(lr=lr)) for lr in (0.4, 0.5)]
    assert search._promoted(ranked, 3) == [ranked[0], ranked[1], ranked[3]]
    assert search._promoted(ranked, 1) == [ranked[0], ranked[3]]
    assert search._promoted(ranked, 9) == ranked


def test_fixed_fields_are_not_searched(backbone: Backbone) -> None:
    told = searched(backbone, ("vpt_deep",), fixed={**SHORT, "lr": 0.01}).metrics["search"]["trials"]
    assert {(trial["lr"], trial["prompts"]) for trial in told} == {(0.01, 4)}
    told = searched(backbone, ("vpt_deep",), fixed={**SHORT, "optimizer": "sgd"}).metrics["search"]["trials"]
    assert {trial["optimizer"] for trial in told} == {"sgd"}


def test_a_search_among_heads_only(backbone: Backbone) -> None:
    found = searched(backbone, ("linear",))
    assert found.method.name == "linear"
    assert {trial["rung"] for trial in found.metrics["search"]["trials"]} == {0}


@pytest.mark.parametrize("when", ["among the heads", "in a rung", "in the full fit"])
def test_an_interrupted_search_that_is_resumed_ends_with_the_same_bits(
    backbone: Backbone, found: FitResult, when: str, tmp_path: Path
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: Progress) -> None:
        reached = {
            "among the heads": progress.trial == 3,
            "in a rung": progress.trial == 9 and progress.step == 1,
            "in the full fit": progress.trial == 0 and progress.epoch == 3,
        }
        if reached[when]:
            raise PowerCutError

    file = tmp_path / "job.safetensors"
    with pytest.raises(PowerCutError):
        searched(backbone, on_progress=cut, on_checkpoint=lambda state: checkpoint.write(file, state))
    state = checkpoint.read(file)
    assert isinstance(state, Checkpoint)
    trials: list[int] = []
    again = searched(backbone, resume=state, on_progress=lambda progress: trials.append(progress.trial))
    assert min((trial for trial in trials if trial), default=99) > len(state.trials)
    assert again.metrics == found.metrics
    for name, value in found.params.items():
        np.testing.assert_array_equal(value, again.params[name])


def with_candidates(*candidates: dict[str, Any]) -> Method:
    own: Method = type("Own", (VptDeep,), {"candidates": candidates})()
    return own


def test_a_candidate_that_diverges_is_noted_and_passed_over(backbone: Backbone) -> None:
    method = with_candidates({"lr": 1e30, "optimizer": "sgd"}, {"lr": 0.01})
    found = run_alone(backbone, searching(backbone, [method], SPLITS, 3, SHORT, budget=1000))
    wild = [trial for trial in found.metrics["search"]["trials"] if trial["lr"] == 1e30]
    assert [trial["val_nll"] for trial in wild] == [None]
    assert found.recipe.lr == 0.01


def test_a_head_that_is_better_after_all_is_kept(backbone: Backbone) -> None:
    method = with_candidates({"lr": 1e-9}, {"lr": 2e-9})
    found = run_alone(backbone, searching(backbone, [Registry().get("linear"), method], SPLITS, 3, SHORT, budget=1000))
    assert found.method.name == "linear"
    assert {trial["method"] for trial in found.metrics["search"]["trials"]} == {"linear", "vpt_deep"}


def test_progress_tells_trials_and_their_outcomes(backbone: Backbone) -> None:
    seen: list[Progress] = []
    found = searched(backbone, on_progress=seen.append)
    tried = [progress.trial_figures for progress in seen if progress.trial_figures]
    assert tried == found.metrics["search"]["trials"]
    assert {progress.trials for progress in seen if progress.trial} == {len(tried)}
    assert not any(progress.epoch_ended for progress in seen if progress.trial)
    assert sum(progress.epoch_ended for progress in seen) >= found.recipe.epochs


def test_small_data_are_fitted_for_longer(backbone: Backbone) -> None:
    own = [Registry().get("vpt_deep")]
    few = search._Plan.make(backbone, own, Splits(stripes(100, 1), SPLITS.val, None), {}, 30_000)
    many = search._Plan.make(backbone, own, Splits(stripes(1000, 1), SPLITS.val, None), {}, 30_000)
    assert few.prompted[0].recipe.epochs == 96
    assert many.prompted[0].recipe.epochs == own[0].defaults["epochs"]


def test_a_sample_has_every_class() -> None:
    pictures = stripes(60, 1)
    part = sample(pictures, 12, seed=0)
    assert 9 <= len(part) <= 15
    assert set(part.targets) == {0, 1, 2}
    assert sample(pictures, 60, seed=0) is pictures


def test_large_data_are_tried_in_part(backbone: Backbone) -> None:
    splits = Splits(stripes(300, 5), SPLITS.val, None)
    own = [Registry().get(name) for name in ALL]
    found = run_alone(backbone, searching(backbone, own, splits, 3, SHORT, budget=600))
    assert all(trial["images"] < 300 for trial in found.metrics["search"]["trials"] if trial["rung"] == 1)
    assert found.metrics["train_images"] == 300


def test_a_preset_is_searched_on_its_own_grid(backbone: Backbone) -> None:
    fixed = {"preset": "vpt", "epochs": 4, "batch_size": 16, "warmup_epochs": 1, "prompts": 2}
    found = searched(backbone, ("vpt_deep",), fixed=fixed, budget=1500)
    trials = found.metrics["search"]["trials"]
    assert {trial["optimizer"] for trial in trials} == {"sgd"}
    first = [trial["lr"] for trial in trials if trial["rung"] == 1][:3]
    assert first == pytest.approx([base * 16 / 256 for base in (1.0, 2.5, 0.5)])
    assert found.recipe.optimizer == "sgd"


def test_what_nobody_suggested_is_tried_as_it_is_asked_for(backbone: Backbone) -> None:
    found = searched(
        backbone, ("linear", "vpt_deep"), fixed={**SHORT, "preset": "vpt", "optimizer": "adamw", "lr": 0.01}
    )
    assert {trial["optimizer"] for trial in found.metrics["search"]["trials"]} == {"adamw"}
    assert found.recipe.weight_decay == 1e-3, "the preset's"
