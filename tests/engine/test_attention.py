"""Where the network looked is told of the very forward that answers."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from server.engine import attention, lens, vit
from server.engine.backbone import Backbone
from server.engine.lens import Prefix
from tests.engine.golden_cases import Bench, Task, backbone, recipe
from tests.engine.test_isolation import TASKS, a_task, picture

EXACT = 1e-12


@pytest.fixture(scope="module")
def eye() -> Backbone:
    return backbone("vit_nano", 101, torch.float64)


@pytest.mark.parametrize("own", TASKS, ids=lambda own: f"{own.method}-{own.lengths}")
def test_its_features_are_the_fast_forwards(eye: Backbone, own: Task) -> None:
    images = torch.from_numpy(recipe.images(1, 64, 5)).double()
    x = vit.embed(eye, images)
    seen = attention.trace(eye, x.clone(), lens.condition(own.lens(eye), 1))
    fast = vit.forward(eye, x, lens.condition(own.lens(eye), 1))
    np.testing.assert_allclose(seen.features, fast[0].numpy(), atol=EXACT, rtol=0)


@pytest.mark.parametrize("own", TASKS, ids=lambda own: f"{own.method}-{own.lengths}")
def test_shares_add_up_and_prompts_have_theirs(eye: Backbone, own: Task) -> None:
    bench = Bench(eye)
    seen = attention.look(bench.engine, picture(3), bench.seat(own.lens(eye)))
    for looked in (seen.last, seen.rollout):
        assert looked.grid.shape == (4, 4)
        assert (looked.grid >= 0).all()
        assert looked.grid.sum() + looked.prompts + looked.rest == pytest.approx(1, abs=1e-9)
        assert (looked.prompts > 0) is (own.method != "linear")


def test_it_is_the_seat_that_looks(eye: Backbone) -> None:
    """Its own mean and std included: the features are those that the seat's head answers from."""
    bench = Bench(eye)
    own = a_task("vpt_deep", (3, 0, 5, 2), 4, 1)
    seat = bench.seat(own.lens(eye), 0.3, 0.2)
    seen = attention.look(bench.engine, picture(3), seat)
    logits = own.params["head.weight"].numpy() @ seen.features + own.params["head.bias"].numpy()
    np.testing.assert_allclose(logits, bench.engine.run([(picture(3), seat)])[0], atol=1e-9, rtol=0)


def test_all_attention_on_one_prompt(eye: Backbone) -> None:
    """A prompt whose key outshouts every other gets the whole last block, and what rollout gives it by hand."""

    class Loud(lens.Plain):
        def prefix(self, layer: int) -> Prefix | None:
            return Prefix(self.keys[layer], torch.zeros(1, 2, 64, dtype=torch.float64), None)

    images = torch.from_numpy(recipe.images(1, 64, 5)).double()
    loud = Loud()
    x = vit.embed(eye, images)
    block = eye.blocks[-1]
    # the class token's own query, head by head, as a key: its score is a square, and so above all others when scaled
    plain = attention.trace(eye, x.clone(), lens.Plain())
    assert plain.last.prompts == plain.rollout.prompts == 0
    keys = torch.zeros(len(eye.blocks), 1, 2, 64, dtype=torch.float64)
    loud.keys = keys
    even = attention.trace(eye, x.clone(), loud)
    for index in range(len(eye.blocks) - 1):
        x, _ = attention._block(eye.model.blocks[index], x, loud.prefix(index))
    keys[-1, 0, 0] = 1e4 * block.query(block.norm1(x))[0, 0]
    seen = attention.trace(eye, vit.embed(eye, images), loud)
    assert seen.last.prompts == pytest.approx(1)
    assert seen.last.grid.sum() == pytest.approx(0, abs=1e-6)
    assert 0 < even.last.prompts < 1
    assert seen.rollout.prompts > even.rollout.prompts


def test_rollout_is_abnar_and_zuidemas_product() -> None:
    """Two blocks by hand: two tokens, a prompt in the second block."""
    first = attention.Flow.of(torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64))
    second = attention.Flow.of(torch.tensor([[0.4, 0.2, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64))
    flow = attention.Flow.at_start(2).through(first).through(second)
    one = np.array([[0.75, 0.25], [0.0, 1.0]])
    two = np.array([[0.1 + 0.5, 0.2], [0.0, 0.5 + 0.5]])
    np.testing.assert_allclose(flow.tokens.numpy(), two @ one)
    np.testing.assert_allclose(flow.prefix.numpy(), [0.2, 0.0])


def test_a_backbone_that_averages_its_patches_shows_their_attention() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=0,
        global_pool="avg", class_token=False, reg_tokens=2, qk_norm=True, pretrained=False,
    )  # fmt: skip
    torch.manual_seed(0)
    eye = Backbone.of("averaging", model, dtype=torch.float64)
    x = vit.embed(eye, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    seen = attention.trace(eye, x.clone(), lens.Plain())
    fast = vit.forward(eye, x, lens.Plain())
    np.testing.assert_allclose(seen.features, fast[0].numpy(), atol=EXACT, rtol=0)
    assert seen.last.grid.sum() + seen.last.rest == pytest.approx(1)
    assert seen.last.rest > 0
