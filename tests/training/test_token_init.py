"""Prompts that begin as tokens of the task's own pictures: equal to the literal tokens, repeatable, and refused where
there are no prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.backbone import Backbone
from server.errors import ServiceError
from server.methods.method import Method
from server.methods.registry import METHODS, Registry
from server.training import checkpoint, token_init
from server.training.co_batching import run_alone
from server.training.data import InMemory, LabelledImages
from server.training.fit import FitResult, fit
from server.training.frozen import FrozenFeatures
from server.training.progress import Progress
from server.training.recipe import resolve
from server.training.search import searching
from tests.engine.golden_cases import golden_backbone
from tests.training.test_fit import QUICK, SPLITS, stripes

INITS = tuple(token_init.CHOICES)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


PROMPTED = [
    method for method in METHODS if token_init.has_prompts(method, golden_backbone("vit_nano", 101, torch.float64).spec)
]


def tokens_of(
    backbone: Backbone, pictures: LabelledImages, lengths: tuple[int, ...], seed: int = 0
) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frozen = FrozenFeatures(backbone)
    return run_alone(
        backbone, token_init.layer_tokens(frozen, pictures, lengths, generator=generator, tick=lambda: None)
    )


def literal(backbone: Backbone, pictures: LabelledImages) -> list[torch.Tensor]:
    """[B, patches, D] for each layer, as the official code says it: the patch embeddings without position before the
    first block, and behind each block its output without class token. timm's own modules, nothing of the forward."""
    own = backbone.spec.preprocess
    pixels = torch.from_numpy(pictures.images.read(np.arange(len(pictures)))).to(backbone.dtype) / 255
    pixels = ((pixels - torch.tensor(own.mean)) / torch.tensor(own.std)).permute(0, 3, 1, 2)
    model = backbone.model
    found = [model.patch_embed(pixels)]
    x = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
    for block in model.blocks[:-1]:
        x = block(x)
        found.append(x[:, backbone.spec.prefix_tokens :])
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def test_they_are_the_tokens_that_enter_each_layer(backbone: Backbone) -> None:
    pictures = stripes(7, 4)
    found, expected = tokens_of(backbone, pictures, (3, 1, 2, 4)), literal(backbone, pictures)
    assert list(found) == [0, 1, 2, 3]
    for layer, tokens in found.items():
        whole = expected[layer].float()
        assert tokens.shape == (7 * whole.shape[1], backbone.spec.dim)
        for own, theirs in zip(tokens.split(whole.shape[1]), whole, strict=True):
            distance = _distance(own, theirs)  # all of a picture's tokens, in an order of their own
            assert distance.min(1).values.max() < 1e-4
            assert len(set(distance.argmin(1).tolist())) == len(theirs)


@torch.no_grad()
def test_only_layers_with_prompts_are_looked_at(backbone: Backbone) -> None:
    every, some = tokens_of(backbone, stripes(3, 4), (1, 1, 1, 1)), tokens_of(backbone, stripes(3, 4), (0, 0, 1, 0))
    assert list(some) == [2]
    first, second = (found[2].sort(0).values for found in (every, some))
    torch.testing.assert_close(first, second)


def test_many_pictures_are_sampled_class_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_init, "MOST_PICTURES", 30)
    seen = token_init.pictures_for(stripes(90, 4), seed=3)
    assert list(seen.targets) == sorted(seen.targets)
    assert np.bincount(seen.targets).tolist() == [10, 10, 10]
    lonely = LabelledImages(InMemory(np.zeros((40, 1, 1, 3), np.uint8)), np.arange(40))
    assert len(token_init.pictures_for(lonely, seed=3)) == 30, "a class's last picture is never held out"


def test_no_more_tokens_than_are_allowed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_init, "MOST_TOKENS", 20)
    assert len(tokens_of(backbone, stripes(5, 4), (1, 0, 0, 0))[0]) == 20


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), count=st.integers(1, 30), how=st.sampled_from(INITS), seed=st.integers(0, 9))
def test_any_number_of_prompts_is_made_of_any_number_of_tokens(n: int, count: int, how: str, seed: int) -> None:
    tokens = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    first, again = (token_init.CHOICES[how](tokens, count, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first.shape == (count, 5)
    assert torch.equal(first, again)
    assert first.isfinite().all()
    assert first.min() >= tokens.min() - 1e-5, "all lie within what the tokens span"
    assert first.max() <= tokens.max() + 1e-5


def test_random_tokens_differ_and_means_are_means() -> None:
    tokens, generator = torch.arange(24.0).reshape(12, 2), torch.Generator().manual_seed(1)
    drawn = token_init.drawn(tokens, 12, generator)
    assert sorted(drawn[:, 0].tolist()) == tokens[:, 0].tolist()
    torch.testing.assert_close(
        token_init.means(tokens, 3, generator), torch.stack([part.mean(0) for part in tokens.split(4)])
    )


def test_k_means_finds_clusters_that_are_there() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    tokens = (truth[:, None] + torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    found = token_init.centres(tokens, 3, torch.Generator().manual_seed(0))
    assert torch.cdist(truth, found).min(1).values.max() < 0.5
    nearest = torch.cdist(tokens, found).argmin(1)
    means = torch.stack([tokens[nearest == one].mean(0) for one in range(3)])
    torch.testing.assert_close(found, means, msg="where it ends, each centre is its members' mean")


def fitted(backbone: Backbone, method: Method, **changes: object) -> FitResult:
    return fit(backbone, method, SPLITS, 3, resolve(method.defaults, {**QUICK, "epochs": 2, **changes}))


BEGINNINGS = [(method, "tokens") for method in PROMPTED] + [(Registry().get("vpt_deep"), how) for how in INITS[1:]]


@pytest.mark.parametrize(("method", "how"), BEGINNINGS, ids=lambda one: getattr(one, "name", one))
def test_a_fit_begins_with_them_and_repeats_itself(backbone: Backbone, method: Method, how: str) -> None:
    first, second, plain = (fitted(backbone, method, init=init, epochs=1, lr=1e-12) for init in (how, how, "uniform"))
    np.testing.assert_array_equal(first.params["prompts"], second.params["prompts"])
    assert first.metrics == second.metrics
    seen = token_init.pictures_for(SPLITS.train, 0)
    pool = torch.cat([tokens.flatten(0, 1) for tokens in literal(backbone, seen)]).detach().float()
    prompts = torch.from_numpy(first.params["prompts"])
    if how == "tokens":
        assert _distance(prompts, pool).min(1).values.max() < 1e-3
    assert not np.allclose(first.params["prompts"], plain.params["prompts"], atol=1e-3)
    assert first.metrics["forward_passes"] == plain.metrics["forward_passes"] + len(seen)


def test_an_interrupted_fit_goes_on_from_them(backbone: Backbone, tmp_path: Path) -> None:
    class PowerCutError(Exception):
        pass

    def cut(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            raise PowerCutError

    own, file = Registry().get("vpt_deep"), tmp_path / "job.safetensors"
    recipe = resolve(own.defaults, {**QUICK, "epochs": 3, "init": "tokens_kmeans", "prompt_dropout": 0.2})
    undisturbed = fit(backbone, own, SPLITS, 3, recipe)
    with pytest.raises(PowerCutError):
        fit(
            backbone, own, SPLITS, 3, recipe, on_progress=cut, on_checkpoint=lambda state: checkpoint.write(file, state)
        )
    resumed = fit(backbone, own, SPLITS, 3, recipe, resume=checkpoint.read(file))
    for name, value in undisturbed.params.items():
        np.testing.assert_array_equal(value, resumed.params[name])
    assert undisturbed.metrics == resumed.metrics


def test_methods_without_prompts_refuse_and_say_so(backbone: Backbone) -> None:
    assert {method.name for method in PROMPTED} >= {"vpt_deep", "vpt_shallow", "cvpt", "prompt_bias"}
    for name in ("linear", "lora", "memory"):
        with pytest.raises(ServiceError, match=f"init 'tokens': expected a method with prompts, got {name}"):
            fitted(backbone, Registry().get(name), init="tokens")


def test_no_prompts_are_no_tokens(backbone: Backbone) -> None:
    assert fitted(backbone, Registry().get("vpt_deep"), init="tokens", prompts=0).params["prompts"].shape == (
        0,
        backbone.spec.dim,
    )


def test_a_search_holds_to_it_where_there_are_prompts(backbone: Backbone) -> None:
    methods = [Registry().get(name) for name in ("linear", "vpt_deep")]
    fixed = {"epochs": 2, "batch_size": 20, "prompts": 2, "init": "tokens", "lr": 0.01, "optimizer": "adamw"}
    found = run_alone(backbone, searching(backbone, methods, SPLITS, 3, fixed, budget=400))
    assert {trial["method"] for trial in found.metrics["search"]["trials"]} == {"linear", "vpt_deep"}
    assert found.recipe.init == ("tokens" if found.method.name == "vpt_deep" else "uniform")
