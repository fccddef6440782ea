"""What heads read: the class token, the image, the image and its prompts; in one batch, each as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from server.engine import attention_maps, reference, vit
from server.engine.backbone import Backbone
from server.engine.block import FrozenBlock
from server.engine.lens import Lens, Plain, condition
from server.engine.spec import TASK_POOLS, Pool
from server.errors import ServiceError
from server.methods.method import Params
from server.methods.partial import Partial
from server.methods.pooling import lower_with_pool
from server.methods.registry import Registry
from server.training import frozen
from tests.engine.golden_cases import Bench, golden_backbone
from tests.engine.test_packed import SMALL, images
from tests.methods.test_methods import bundle
from tests.training.test_fit import SPLITS, fitted

BACKBONES = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "MAE": ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # with a class token, and its norm behind the pool
    "no class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "attention": ("vit_base_patch16_siglip_224", {}),
}
LENGTHS = (3, 0, 5)
METHODS = ("vpt_deep", "vpt_shallow", "prompt_bias", "cvpt", "lora", "bias", "linear", "mlp")


def a_backbone(kind: str) -> Backbone:
    torch.manual_seed(0)
    arch, options = BACKBONES[kind]
    model = timm.create_model(arch, **SMALL, **options)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return Backbone.of(arch, model, dtype=torch.float64)


def pools_of(backbone: Backbone) -> list[Pool | None]:
    return [None, *(pool for pool in TASK_POOLS if pool != "cls" or backbone.spec.class_tokens)]


def drawn(backbone: Backbone, method: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Params, tuple[int, ...]]:
    chosen = Registry().get(method)
    possible = chosen.prompt_lengths(backbone.spec, 1)
    lengths = tuple(length * some for length, some in zip(lengths, possible, strict=True))
    generator = torch.Generator().manual_seed(2)
    shapes = chosen.shapes(backbone.spec, lengths, 5)
    return {name: 0.3 * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}, lengths


def a_lens(backbone: Backbone, method: str, pool: Pool | None, lengths: tuple[int, ...] = LENGTHS) -> Lens:
    params, prompt_lengths = drawn(backbone, method, lengths)
    return lower_with_pool(Registry().get(method), backbone, params, prompt_lengths, pool)


@pytest.mark.parametrize("kind", BACKBONES)
def test_all_poolings_of_all_methods_in_one_batch_are_the_literal_ones(kind: str) -> None:
    backbone, pixels = a_backbone(kind), images(2).double()
    bench = Bench(backbone)
    tasks = [(method, pool) for method in METHODS for pool in pools_of(backbone)]
    with torch.inference_mode():
        work = [(row, bench.seat(a_lens(backbone, *task)), task) for task in tasks for row in range(2)]
        random.Random(0).shuffle(work)
        answers = bench.engine.logits(vit.embed(backbone, pixels), [(row, seat) for row, seat, _ in work])
        for (row, _, (method, pool)), result in zip(work, answers, strict=True):
            truth = reference.logits(method, backbone, pixels, *drawn(backbone, method), pool=pool)[row]
            torch.testing.assert_close(result, truth, atol=1e-9, rtol=0, msg=f"{method} {pool}")


@pytest.mark.parametrize("kind", BACKBONES)
def test_prompts_that_are_pooled_may_be_ragged(kind: str) -> None:
    """Rows of one lane whose prompts differ in number: what is filled up counts neither as a key nor in the mean."""
    backbone, pixels = a_backbone(kind), images(1).double()
    bench = Bench(backbone)
    tasks = [(method, lengths) for method in ("vpt_deep", "vpt_shallow") for lengths in ((3, 0, 5), (7, 2, 1))]
    with torch.inference_mode():
        seats = [bench.seat(a_lens(backbone, method, "image_and_prompts", lengths)) for method, lengths in tasks]
        answers = bench.engine.logits(vit.embed(backbone, pixels), [(0, seat) for seat in seats])
        for (method, lengths), result in zip(tasks, answers, strict=True):
            truth = reference.logits(
                method, backbone, pixels, *drawn(backbone, method, lengths), pool="image_and_prompts"
            )[0]
            torch.testing.assert_close(result, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "prompt_bias"])
@pytest.mark.parametrize("kind", ["class token", "MAE", "attention"])
def test_the_gradients_are_the_literal_ones(kind: str, method: str) -> None:
    backbone, pixels, (params, lengths) = a_backbone(kind), images(2).double(), drawn(a_backbone(kind), method)
    result, expected = ({k: v.clone().requires_grad_() for k, v in params.items()} for _ in range(2))
    lens = lower_with_pool(Registry().get(method), backbone, result, lengths, "image_and_prompts")
    logits = vit.classify(vit.forward(backbone, vit.embed(backbone, pixels), condition(lens, 2)), lens)
    (logits**2).sum().backward()
    (reference.logits(method, backbone, pixels, expected, lengths, pool="image_and_prompts") ** 2).sum().backward()
    for name, parameter in expected.items():
        torch.testing.assert_close(
            result[name].grad, parameter.grad, atol=1e-9 * float(parameter.grad.abs().max()), rtol=1e-7
        )


def test_it_is_what_the_official_code_makes_of_mae() -> None:
    """[CLS | p prompts | patches]; each layer's prompts replace those before; the mean over all tokens but the class
    token, the last layer's prompts included; then the norm (facts of KMnP/vpt, vit_mae.py), on timm's own modules."""
    backbone, pixels = a_backbone("MAE"), images(3).double()
    model, lengths = backbone.model, (4, 4, 4)
    params, _ = drawn(backbone, "vpt_deep", lengths)
    with torch.inference_mode():
        x = model._pos_embed(model.patch_embed(pixels))
        for index, (block, prompts) in enumerate(zip(model.blocks, params["prompts"].split(4), strict=True)):
            x = torch.cat((x[:, :1], prompts.expand(3, -1, -1), x[:, 1 + 4 * (index > 0) :]), dim=1)
            x = block(x)
        truth = model.fc_norm(x[:, 1:].mean(1)) @ params["head.weight"].T + params["head.bias"]
        lens = lower_with_pool(Registry().get("vpt_deep"), backbone, params, lengths, "image_and_prompts")
        result = vit.classify(vit.forward(backbone, vit.embed(backbone, pixels), condition(lens, 3)), lens)
        plain = vit.classify(
            vit.forward(backbone, vit.embed(backbone, pixels), condition(replace(lens, pool="image"), 3)), lens
        )
    torch.testing.assert_close(result, truth, atol=1e-9, rtol=0)
    assert (plain - truth).abs().max() > 1e-3, "the prompts' outputs count"


def test_prompt_dropout_reaches_the_prompts_that_are_pooled() -> None:
    """Prompts that differ from row to row [B, Σp, D]: each row as if it were alone."""
    backbone, pixels = a_backbone("MAE"), images(3).double()
    params, lengths = drawn(backbone, "vpt_deep")
    keep = torch.rand(3, *params["prompts"].shape, generator=torch.Generator().manual_seed(1)) > 0.3
    rows = {**params, "prompts": params["prompts"] * keep}
    with torch.inference_mode():
        lens = lower_with_pool(Registry().get("vpt_deep"), backbone, rows, lengths, "image_and_prompts")
        result = vit.classify(vit.forward(backbone, vit.embed(backbone, pixels), condition(lens, 3)), lens)
        for row in range(3):
            alone = {**params, "prompts": rows["prompts"][row]}
            first = pixels[row : row + 1]
            truth = reference.logits("vpt_deep", backbone, first, alone, lengths, pool="image_and_prompts")
            torch.testing.assert_close(result[row : row + 1], truth, atol=1e-9, rtol=0)


def test_a_class_tokens_rows_ask_the_last_block_for_one_token_whatever_their_neighbours_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = a_backbone("class token")
    bench, seen = Bench(backbone), []
    seats = [bench.seat(a_lens(backbone, "vpt_deep", pool)) for pool in (None, "image", "image_and_prompts")]
    after_attention = FrozenBlock.after_attention

    def note(self: FrozenBlock, x: Tensor, mixed: Tensor) -> Tensor:
        if self is backbone.blocks[-1]:
            seen.append(len(x))
        return after_attention(self, x, mixed)

    monkeypatch.setattr(FrozenBlock, "after_attention", note)
    x = vit.embed(backbone, images(2).double())
    tokens, prompts = backbone.spec.tokens, LENGTHS[-1]
    for counts, count in ([0], 1), ([0, 1], 1 + tokens), ([0, 1, 2], 1 + tokens + tokens + prompts):
        bench.engine.logits(x, [(row, seats[n]) for n in counts for row in range(2)])
        assert seen.pop() == 2 * count


def test_heads_that_read_alike_share_a_trunk_and_others_do_not() -> None:
    backbone = a_backbone("class token")
    bench = Bench(backbone)
    keys = [bench.engine._trunk_key(bench.seat(a_lens(backbone, *task))) for task in (
        ("linear", None), ("mlp", "cls"), ("linear", "image"), ("mlp", "image_and_prompts"),
    )]  # fmt: skip
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_seats_of_different_lanes_cannot_be_gathered_together() -> None:
    backbone = a_backbone("class token")
    bench = Bench(backbone)
    seats = [bench.seat(a_lens(backbone, "vpt_deep", pool)) for pool in ("cls", "image")]
    with pytest.raises(ValueError, match="expected seats of one lane"):
        bench.rack.gather([seat.place for seat in seats])


@pytest.mark.parametrize("pool", TASK_POOLS)
@pytest.mark.parametrize("method", ["linear", "vpt_deep", "vpt_shallow", "prompt_bias"])
def test_where_the_network_looked_adds_up_under_every_pooling(method: str, pool: Pool) -> None:
    backbone = a_backbone("registers")
    rows, x = condition(a_lens(backbone, method, pool), 1), vit.embed(backbone, images(1).double())
    seen = attention_maps.trace(backbone, x.clone(), rows)
    np.testing.assert_allclose(seen.features, vit.forward(backbone, x, rows)[0].numpy(), atol=1e-12, rtol=0)
    for attention in (seen.last, seen.rollout):
        assert attention.grid.sum() + attention.prompts + attention.rest == pytest.approx(1)
        assert (attention.prompts > 0) is (method != "linear")


# --- from a recipe to a bundle and back -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "pool"), [("vpt_deep", "image_and_prompts"), ("linear", "image")])
def test_the_served_answers_are_those_that_were_fitted(method: str, pool: Pool) -> None:
    backbone, registry = golden_backbone("vit_nano", 101, torch.float32), Registry()
    result = fitted(backbone, method, pool=pool, epochs=4)
    assert result.recipe.to_json()["pool"] == pool
    message = {
        "labels": ("a", "b", "c"),
        "prompt_lengths": result.prompt_lengths,
        "tensors": result.params,
        "pool": pool,
    }
    loaded, bench = registry.load(bundle(backbone, method, **message), backbone), Bench(backbone)
    seat = bench.seat(loaded.lens, backbone.spec.preprocess.mean[0], backbone.spec.preprocess.std[0])
    rows = bench.engine.run([(image, seat) for image in SPLITS.val.images.read(np.arange(30))])
    right = np.mean([row.argmax() for row in rows] == SPLITS.val.targets)
    assert right == pytest.approx(result.metrics["val_accuracy"], abs=1e-6)
    assert result.metrics["val_accuracy"] > 0.6


def test_frozen_features_are_kept_apart_by_pooling() -> None:
    backbone = golden_backbone("vit_nano", 101, torch.float32)
    kept = frozen.FrozenFeatures(backbone)
    assert kept._what(backbone.spec.depth, None) != kept._what(backbone.spec.depth, "image")
    assert kept._what(1, None) == kept._what(1, "image"), "tokens are the same whatever is read of them later"


def test_a_class_token_that_is_not_there_cannot_be_read() -> None:
    backbone = a_backbone("no class token")
    with pytest.raises(ServiceError, match="reads the class token, backbone vit_tiny_patch16_224 has none") as caught:
        fitted(backbone, "linear", pool="cls")
    assert caught.value.code == "invalid_request"
    with pytest.raises(ServiceError, match="the bundle's pool 'cls'") as caught:
        Registry().check(bundle(backbone, "linear", pool="cls"), backbone.spec)
    assert caught.value.code == "bad_bundle"


def test_a_reader_has_a_token_of_its_own_to_be_read() -> None:
    backbone = a_backbone("class token")
    with pytest.raises(ServiceError, match="method readonly reads with a class token of its own"):
        a_lens(backbone, "readonly", "image")
    assert a_lens(backbone, "readonly", "image", (0, 0, 0)).pool == "image", "without prompts there are no readers"


def test_heads_of_other_poolings_do_not_take_the_feature_that_readers_run() -> None:
    """Readers' trunk gives head-only rows the backbone's own feature; a head that reads the image runs beside it."""
    backbone, pixels = a_backbone("class token"), images(2).double()
    bench, tasks = Bench(backbone), [("readonly", None), ("linear", None), ("linear", "image")]
    with torch.inference_mode():
        seats = [bench.seat(a_lens(backbone, *task)) for task in tasks]
        answers = bench.engine.logits(vit.embed(backbone, pixels), [(row, seat) for seat in seats for row in range(2)])
        for n, (method, pool) in enumerate(tasks):
            truth = reference.logits(method, backbone, pixels, *drawn(backbone, method), pool=pool)
            torch.testing.assert_close(torch.stack(answers[2 * n : 2 * n + 2]), truth, atol=1e-9, rtol=0)


def test_a_recipes_word_for_the_backbones_own_pooling_changes_nothing() -> None:
    backbone = a_backbone("class token")
    assert a_lens(backbone, "linear", "cls").pool is None
    assert a_lens(backbone, "cvpt", "image_and_prompts").pool == "image", "its prompts have no outputs"
    assert a_lens(backbone, "vpt_deep", "image_and_prompts", (3, 4, 0)).pool == "image"
    x = vit.embed(backbone, images(1).double())
    assert torch.equal(vit.forward(backbone, x, Plain()), vit.forward(backbone, x, Plain("cls")))


@pytest.mark.parametrize("kind", ["class token", "MAE", "distilled", "attention"])
def test_a_baselines_last_blocks_pool_as_the_backbone_does(kind: str) -> None:
    """Before its first step `partial` is the backbone with a fresh head."""
    backbone, pixels = a_backbone(kind), images(2).double()
    model = Partial(1).model(backbone, 3, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = vit.embed(backbone, pixels)
        result = model(None, vit.tokens_at(backbone, x, backbone.spec.depth - 1))
        torch.testing.assert_close(result, model.head(vit.forward(backbone, x, Plain())), atol=1e-9, rtol=0)
