"""Where the network looked is told of the very forward that answers."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers.attention import Attention

from server.engine import attention_maps, lens, reference, vit
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from tests.engine.golden_cases import Bench, Task, golden_backbone, recipe
from tests.engine.test_isolation import TASKS, a_task, picture

EXACT = 1e-12
LITERAL = {"linear": reference.linear, "vpt_shallow": reference.vpt_shallow, "vpt_deep": reference.vpt_deep}
TASKS_BY_REFERENCE = [task for task in TASKS if task.method in LITERAL]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


@pytest.mark.parametrize("task", TASKS_BY_REFERENCE, ids=lambda task: f"{task.method}-{task.lengths}")
def test_its_features_are_the_fast_forwards(backbone: Backbone, task: Task) -> None:
    images = torch.from_numpy(recipe.images(1, 64, 5)).double()
    x = vit.embed(backbone, images)
    seen = attention_maps.trace(backbone, x.clone(), lens.condition(task.lens(backbone), 1))
    fast = vit.forward(backbone, x, lens.condition(task.lens(backbone), 1))
    np.testing.assert_allclose(seen.features, fast[0].numpy(), atol=EXACT, rtol=0)


@pytest.mark.parametrize("task", TASKS_BY_REFERENCE, ids=lambda task: f"{task.method}-{task.lengths}")
def test_its_shares_are_the_literal_forwards(backbone: Backbone, task: Task) -> None:
    """Every block's softmax over [class token | prompts | patches], as the papers draw it, taken from timm's modules;
    and rolled out from the tokens that were there at the start."""
    images = torch.from_numpy(recipe.images(1, 64, 5)).double()
    blocks = literal_shares(backbone, task, images)
    lengths = task.lengths if task.method == "vpt_deep" else (task.lengths[0],) * len(blocks)
    image, prompts = rolled_out(blocks, lengths, carried=task.method == "vpt_shallow")
    last = blocks[-1][0]
    p = lengths[-1]
    seen = attention_maps.trace(backbone, vit.embed(backbone, images), lens.condition(task.lens(backbone), 1))
    np.testing.assert_allclose(seen.last.grid.ravel(), last[1 + p :], atol=EXACT, rtol=0)
    np.testing.assert_allclose(
        [seen.last.rest, seen.last.prompts], [last[0], last[1 : 1 + p].sum()], atol=EXACT, rtol=0
    )
    np.testing.assert_allclose(seen.rollout.grid.ravel(), image[1:], atol=EXACT, rtol=0)
    np.testing.assert_allclose([seen.rollout.rest, seen.rollout.prompts], [image[0], prompts], atol=EXACT, rtol=0)


def literal_shares(backbone: Backbone, task: Task, images: torch.Tensor) -> list[np.ndarray]:
    """Of each block [1 + p + n, 1 + p + n], the mean over the heads, while `reference.py` runs."""
    result: list[np.ndarray] = []

    def keep(module: Attention, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        query, keys, _ = module.qkv(inputs[0]).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        result.append((query @ keys.mT * module.scale).softmax(-1)[0].mean(0).numpy())

    hooks = [block.attn.register_forward_hook(keep) for block in backbone.model.blocks]
    try:
        with torch.inference_mode():
            if task.method == "vpt_deep":
                reference.vpt_deep(backbone, images, task.params, task.lengths)
            else:
                LITERAL[task.method](backbone, images, task.params)
    finally:
        for hook in hooks:
            hook.remove()
    return result


def rolled_out(blocks: list[np.ndarray], lengths: tuple[int, ...], *, carried: bool) -> tuple[np.ndarray, float]:
    """How much of the class token comes from each image token, and from all prompts: followed from source to source."""
    tokens = len(blocks[0]) - lengths[0]
    content = np.eye(tokens, tokens + 1)  # of each image token: what comes from the image tokens, and from prompts
    prompt = np.eye(tokens + 1)[-1:]
    before = prompt.repeat(lengths[0], axis=0)
    for shares, length in zip(blocks, lengths, strict=True):
        if not carried:
            before = prompt.repeat(length, axis=0)  # fresh ones
        everything = np.concatenate((content[:1], before, content[1:]))
        everything = 0.5 * everything + 0.5 * shares @ everything
        content, before = np.delete(everything, slice(1, 1 + length), axis=0), everything[1 : 1 + length]
    return content[0, :-1], float(content[0, -1])


@pytest.mark.parametrize("method", [method.name for method in Registry().all])
def test_every_method_can_be_watched(backbone: Backbone, method: str) -> None:
    chosen = Registry().get(method)
    lengths = chosen.prompt_lengths(backbone.spec, 3)
    generator = torch.Generator().manual_seed(1)
    params = {name: value.double() for name, value in chosen.init(backbone.spec, lengths, 4, generator).items()}
    params = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    condition = lens.condition(chosen.lower(backbone, params, lengths), 1)
    x = vit.embed(backbone, torch.from_numpy(recipe.images(1, 64, 5)).double())
    seen = attention_maps.trace(backbone, x.clone(), condition)
    np.testing.assert_allclose(seen.features, vit.forward(backbone, x, condition)[0].numpy(), atol=EXACT, rtol=0)
    for attention in (seen.last, seen.rollout):
        assert attention.grid.sum() + attention.prompts + attention.rest == pytest.approx(1)


@pytest.mark.parametrize("task", TASKS_BY_REFERENCE, ids=lambda task: f"{task.method}-{task.lengths}")
def test_shares_add_up_and_prompts_have_theirs(backbone: Backbone, task: Task) -> None:
    bench = Bench(backbone)
    seen = attention_maps.look(bench.engine, picture(3), bench.seat(task.lens(backbone)))
    for attention in (seen.last, seen.rollout):
        assert attention.grid.shape == (4, 4)
        assert (attention.grid >= 0).all()
        assert attention.grid.sum() + attention.prompts + attention.rest == pytest.approx(1, abs=1e-9)
        assert (attention.prompts > 0) is (task.method != "linear")


def test_it_is_the_seat_that_looks(backbone: Backbone) -> None:
    """Its own mean and std included: the features are those that the seat's head answers from."""
    bench = Bench(backbone)
    task = a_task("vpt_deep", (3, 0, 5, 2), 4, 1)
    seat = bench.seat(task.lens(backbone), 0.3, 0.2)
    seen = attention_maps.look(bench.engine, picture(3), seat)
    logits = task.params["head.weight"].numpy() @ seen.features + task.params["head.bias"].numpy()
    np.testing.assert_allclose(logits, bench.engine.run([(picture(3), seat)])[0], atol=1e-9, rtol=0)


def test_rollout_is_abnar_and_zuidemas_product() -> None:
    """Two blocks by hand: two tokens, a prompt in the second block."""
    first = attention_maps.Flow.of(torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64), 2)
    second = attention_maps.Flow.of(torch.tensor([[0.4, 0.2, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64), 2)
    flow = attention_maps.Flow.at_start(2).through(first).through(second)
    single = np.array([[0.75, 0.25], [0.0, 1.0]])
    two = np.array([[0.1 + 0.5, 0.2], [0.0, 0.5 + 0.5]])
    np.testing.assert_allclose(flow.tokens.numpy(), two @ single)
    np.testing.assert_allclose(flow.prefix.numpy(), [0.2, 0.0])


def test_a_backbone_that_averages_its_patches_shows_their_attention() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=0,
        global_pool="avg", class_token=False, reg_tokens=2, qk_norm=True, pretrained=False,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = Backbone.of("averaging", model, dtype=torch.float64)
    x = vit.embed(backbone, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    seen = attention_maps.trace(backbone, x.clone(), lens.Plain())
    fast = vit.forward(backbone, x, lens.Plain())
    np.testing.assert_allclose(seen.features, fast[0].numpy(), atol=EXACT, rtol=0)
    assert seen.last.grid.sum() + seen.last.rest == pytest.approx(1)
    assert seen.last.rest > 0
