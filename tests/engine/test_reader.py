"""Readers: the literal masked forward whatever they bring, one trunk pass for all tasks of a picture, and fitting from
what was read before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.bench import readers as bench
from server.engine import attention_maps, reader, vit
from server.engine.backbone import Backbone
from server.engine.block import FrozenBlock
from server.engine.lens import Lens, condition
from server.engine.reader import Pieces, Reads, Recorded
from server.engine.transfer import DirectTransfer
from server.methods.registry import Registry
from server.training import co_batching, frozen
from server.training.data import InMemory, LabelledImages, Splits
from server.training.fit import FitResult, fit
from server.training.recipe import resolve
from tests.engine.golden_cases import Bench, golden_backbone
from tests.engine.test_additions import ALL_KINDS
from tests.engine.test_isolation import a_task, picture, truth
from tests.engine.test_packed import a_backbone, images

EXACT = 1e-9


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


# --- what they compute ------------------------------------------------------------------------------------------------


def carrying(backbone: Backbone, tokens: int, seed: int) -> Lens:
    """A reader that carries tokens through all layers, which no method of ours does."""
    plain = a_task("linear", (0,) * backbone.spec.depth, 3, seed).lens(backbone)
    drawn = torch.randn(tokens, backbone.spec.dim, generator=torch.Generator().manual_seed(seed)).double()
    return replace(plain, tokens=drawn, reads=True)


def literal_carrying(backbone: Backbone, x: Tensor, lens: Lens) -> Tensor:
    """timm's blocks over [image | CLS' | carried], with a mask that hides the last two from the first."""
    model, image = backbone.model, x.shape[1]
    tokens = torch.cat((x, reader.stand_in(backbone.spec, x)[:, None], lens.tokens.expand(len(x), -1, -1)), dim=1)
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    seen[:image, image:] = False
    seen[image:, : 1 if backbone.spec.pool == "cls" else 0] = False
    for block in model.blocks:
        tokens = block(tokens, attn_mask=seen)
    return vit.classify(model.fc_norm(model.norm(tokens[:, image])), lens)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_carried_tokens_read_as_the_literal_forward_says(kind: str) -> None:
    backbone = a_backbone(torch.float64, False, **ALL_KINDS[kind])
    shapes = [torch.randn(3, backbone.spec.dim).double(), torch.zeros(3).double()]
    nothing = tuple(torch.empty(0, backbone.spec.dim).double() for _ in range(backbone.spec.depth))
    lens = Lens(nothing, nothing, torch.randn(4, backbone.spec.dim).double(), *shapes, reads=True)
    with torch.inference_mode():
        x = vit.embed(backbone, images(2).double())
        result = vit.classify(vit.forward(backbone, x, condition(lens, 2)), lens)
        torch.testing.assert_close(result, literal_carrying(backbone, x, lens), atol=EXACT, rtol=0)


def test_lanes_of_readers_are_ragged_and_pictures_have_as_many_as_they_like(backbone: Backbone) -> None:
    bench, lenses = Bench(backbone), [carrying(backbone, tokens, seed) for seed, tokens in enumerate((1, 5, 2, 9))]
    with torch.inference_mode():
        x = vit.embed(backbone, torch.randn(3, 3, 64, 64).double())
        seats = [bench.seat(lens) for lens in lenses]
        pairs = [(0, 0), (2, 1), (0, 2), (0, 3), (1, 1), (0, 1)]
        logits = bench.engine.logits(x, [(number, seats[task]) for number, task in pairs])
        for (number, task), row in zip(pairs, logits, strict=True):
            expected = literal_carrying(backbone, x[[number]], lenses[task])[0]
            torch.testing.assert_close(row, expected, atol=EXACT, rtol=0)


def test_a_reader_that_brings_nothing_is_the_class_token(backbone: Backbone) -> None:
    """Prompts aside, a fit starts from the linear probe: memory and queries change nothing at first."""
    task = a_task("readonly", (0, 0, 1, 0), 4, 1)
    plain = a_task("linear", (0, 0, 0, 0), 4, 1)
    zero = {name: value * (name.startswith("head")) for name, value in task.params.items()}
    lens = Registry().get("readonly").lower(backbone, zero, task.lengths)
    hidden = replace(lens, keys=tuple(key[:0] for key in lens.keys), values=tuple(value[:0] for value in lens.values))
    assert hidden.reads_from == 2
    with torch.inference_mode():
        x = vit.embed(backbone, torch.randn(2, 3, 64, 64).double())
        result, expected = (vit.forward(backbone, x, condition(lens, 2)) for lens in (hidden, plain.lens(backbone)))
    torch.testing.assert_close(result, expected, atol=EXACT, rtol=0)


def test_readers_take_no_entry(backbone: Backbone) -> None:
    lens = a_task("bias", (0,) * 4, 3, 1).lens(backbone)
    with pytest.raises(ValueError, match="expected no entry"):
        replace(lens, reads=True)


# --- what they cost ---------------------------------------------------------------------------------------------------


def tokens_through(bench: Bench, work: Sequence[tuple[np.ndarray, object]], patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each block's MLP sees."""
    seen: list[int] = []
    real = FrozenBlock.after_attention
    with patch.context() as patched:
        patched.setattr(FrozenBlock, "after_attention", lambda *args: seen.append(len(args[1])) or real(*args))
        bench.engine.run(work)
    return seen


def test_any_number_of_tasks_on_a_picture_cost_one_trunk_pass(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, depth, image = Bench(backbone), backbone.spec.depth, backbone.spec.tokens
    readers = [bench.seat(a_task("readonly", (3, 0, 5, 2), 3, seed).lens(backbone)) for seed in range(10)]
    heads = [bench.seat(a_task("linear", (0,) * depth, 3, seed).lens(backbone)) for seed in range(10)]
    late = bench.seat(a_task("readonly", (0, 0, 0, 2), 3, 5).lens(backbone))
    picture_of, other = picture(0), picture(1)
    cost = [[(picture_of, seat) for seat in seats] for seats in (readers, readers + heads, [late, *heads])]
    through = [tokens_through(bench, work, monkeypatch) for work in cost]
    assert through[0] == [image + 10] * (depth - 1) + [1 + 10]
    assert through[1] == through[0], "heads take what the trunk gives anyway"
    assert through[2] == [image] * (depth - 1) + [1 + 1], "it starts to read in the layer of its first prompt"
    two = tokens_through(bench, [*cost[0], (other, readers[0])], monkeypatch)
    assert two == [2 * image + 11] * (depth - 1) + [2 + 11]


def test_rows_of_other_methods_cost_what_they_did(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers share no lane with them, and a batch without readers has no lane for their trunk."""
    bench = Bench(backbone)
    deep = bench.seat(a_task("vpt_deep", (3, 3, 3, 3), 3, 1).lens(backbone))
    head, reading = (bench.seat(a_task(name, (2, 0, 0, 1), 3, 2).lens(backbone)) for name in ("vpt_deep", "readonly"))
    lanes: list[list[vit.Lane]] = []
    forward = vit.forward_lanes
    monkeypatch.setattr(
        vit, "forward_lanes", lambda backbone, members: lanes.append(list(members)) or forward(backbone, members)
    )
    bench.engine.run([(picture(0), seat) for seat in (deep, head)])
    bench.engine.run([(picture(0), seat) for seat in (deep, head, reading)])
    without, with_ = lanes
    assert [lane.live_trunk for lane in without] == [None]
    assert [(lane.live_trunk is not None, lane.reads is not None) for lane in with_] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert with_[1].x.shape == without[0].x.shape


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_pieces_hold_every_reader_and_no_two_pictures(chosen: list[int]) -> None:
    names = sorted(set(chosen))
    of = np.array([names.index(each) for each in chosen])
    result = Pieces.of(of, len(names), DirectTransfer(torch.device("cpu")))
    pictures = torch.arange(len(names)) if result.pictures is None else result.pictures
    assert (torch.from_numpy(of)[result.readers] == pictures[:, None]).all()
    assert torch.equal(result.readers.flatten()[result.place], torch.arange(len(of)))
    assert result.readers.numel() <= 2 * len(of) + len(names)


# --- fitting ----------------------------------------------------------------------------------------------------------


def drawn(count: int, seed: int) -> LabelledImages:
    """Squares of three colours on noise."""
    generator = np.random.default_rng(seed)
    pixels, targets = generator.integers(0, 90, (count, 64, 64, 3), np.uint8), np.arange(count) % 3
    for image, target in zip(pixels, targets, strict=True):
        image[20:44, 20:44, target] = 220
    return LabelledImages(InMemory(pixels), targets)


SPLITS = Splits(drawn(21, 0), drawn(9, 1), drawn(6, 2))


def fitted(backbone: Backbone, **fields: object) -> FitResult:
    method = Registry().get("readonly")
    recipe = resolve(method.defaults, {"epochs": 3, "prompts": 2, "batch_size": 4, "seed": 3, **fields})
    return fit(backbone, method, SPLITS, 3, recipe)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each run of a trunk by itself has."""
    seen: list[int] = []
    record = vit.record
    monkeypatch.setattr(vit, "record", lambda backbone, x, start: seen.append(len(x)) or record(backbone, x, start))
    return seen


@pytest.mark.parametrize("fields", [{}, {"prompt_layers": [2, 3]}, {"prompt_dropout": 0.3}], ids=str)
def test_a_fit_is_the_same_whatever_is_kept(
    backbone: Backbone, fields: dict[str, object], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the keys and values, those of ten pictures, or none."""
    whole = fitted(backbone, **fields)
    assert runs == [21, 9], "what is learned from and judged on goes through the trunk once"
    assert whole.metrics["forward_passes"] == 21 + 9 + 6
    layers = 2 if "prompt_layers" in fields else 4
    a_picture = 2 * layers * 16 * 64 * 8
    others = []
    for kept in (10, 0):
        runs.clear()
        monkeypatch.setattr(frozen, "MOST_READ_BYTES", kept * a_picture + 1)
        others.append(fitted(backbone, **fields))
        assert (runs[0] == 10) is (kept == 10)
        assert sum(runs) >= kept + 3 * (21 - kept)
    for other in others:
        for name, value in whole.params.items():
            np.testing.assert_allclose(other.params[name], value, atol=1e-6, rtol=1e-5)
        assert other.metrics["test_accuracy"] == whole.metrics["test_accuracy"]
        assert other.metrics["forward_passes"] > whole.metrics["forward_passes"]


def test_augmented_pictures_are_read_anew_each_time(backbone: Backbone, runs: list[int]) -> None:
    fitted(backbone, augment="flip", epochs=2)
    assert runs[:6] == [4, 4, 4, 4, 4, 1]


def test_no_gradient_runs_through_the_trunk(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward sees the readers' tokens alone, also where nothing is kept; and it is the gradient of the whole."""
    task = a_task("readonly", (2, 0, 1, 2), 3, 1)
    x = vit.embed(backbone, torch.randn(5, 3, 64, 64).double())
    gradients, tokens = [], []
    real = FrozenBlock.after_attention

    def counted(self: FrozenBlock, x: Tensor, mixed: Tensor) -> Tensor:
        if mixed.requires_grad:
            tokens.append(mixed[..., 0].numel())
        return real(self, x, mixed)

    monkeypatch.setattr(FrozenBlock, "after_attention", counted)
    for kept in (None, co_batching.RecordedRows(vit.record(backbone, x, 0), None)):
        params = {name: value.clone().requires_grad_() for name, value in task.params.items()}
        lens = Registry().get("readonly").lower(backbone, params, task.lengths)
        ask = co_batching.ForwardRequest(x if kept is None else x[:0], condition(lens, 5), recorded=kept)
        [features] = co_batching._features(backbone, [ask])
        (vit.classify(features, lens) ** 2).sum().backward()
        gradients.append({name: value.grad for name, value in params.items()})
    assert tokens == [5] * (2 * backbone.spec.depth)
    params = {name: value.clone().requires_grad_() for name, value in task.params.items()}
    lens = Registry().get("readonly").lower(backbone, params, task.lengths)
    (vit.classify(vit.forward(backbone, x, condition(lens, 5)), lens) ** 2).sum().backward()
    for result in gradients:
        for name, value in params.items():
            torch.testing.assert_close(result[name], value.grad, atol=EXACT, rtol=1e-9)


def test_a_reader_and_other_methods_fit_in_one_group(backbone: Backbone) -> None:
    """Rows of three fits share a forward; each is sent its own features."""
    x = vit.embed(backbone, torch.randn(2, 3, 64, 64).double())
    lenses = [a_task(name, (2, 0, 1, 2), 3, 1).lens(backbone) for name in ("readonly", "vpt_deep", "readonly")]
    kept = co_batching.RecordedRows(vit.record(backbone, x, 0).take(torch.tensor([1, 0])), None)
    asks = [co_batching.ForwardRequest(x, condition(lens, 2)) for lens in lenses[:2]]
    asks.append(co_batching.ForwardRequest(x[:0], condition(lenses[2], 2), recorded=kept))
    for learning in (False, True):
        with torch.set_grad_enabled(learning):
            result = co_batching._features(backbone, asks)
        for lens, features, pictures in zip(lenses, result, ([0, 1], [0, 1], [1, 0]), strict=True):
            alone = vit.forward(backbone, x[pictures], condition(lens, 2))
            torch.testing.assert_close(features, alone, atol=EXACT, rtol=0)


def test_what_is_recorded_is_what_passes(backbone: Backbone) -> None:
    x = vit.embed(backbone, torch.randn(3, 3, 64, 64).double())
    lens = a_task("readonly", (0, 2, 0, 1), 3, 4).lens(backbone)
    recorded: Recorded = vit.record(backbone, x, 1)
    rows = torch.tensor([2, 0])
    [result] = vit.forward_lanes(backbone, [vit.Lane.reading(condition(lens, 2), Reads(recorded.take(rows)))])
    torch.testing.assert_close(result, vit.forward(backbone, x[rows], condition(lens, 2)), atol=EXACT, rtol=0)


# --- where they looked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(3, 0, 5, 2), (0, 0, 0, 4)])
def test_a_readers_attention_is_told(backbone: Backbone, lengths: tuple[int, ...]) -> None:
    """The last block's shares are the literal softmax's; all add up to 1, and the features are the fast ones."""
    task = a_task("readonly", lengths, 3, 7)
    x = vit.embed(backbone, torch.randn(1, 3, 64, 64).double())
    seen = attention_maps.trace(backbone, x, condition(task.lens(backbone), 1))
    expected = vit.forward(backbone, x, condition(task.lens(backbone), 1))[0]
    np.testing.assert_allclose(seen.features, expected.detach().numpy(), atol=EXACT, rtol=0)
    for attention in (seen.last, seen.rollout):
        assert attention.grid.shape == (4, 4)
        assert attention.prompts > 0
        assert attention.rest >= -EXACT
        assert attention.grid.sum() + attention.prompts + attention.rest == pytest.approx(1)
    share = literal_last_shares(backbone, task.params, task.lens(backbone), x)
    np.testing.assert_allclose(seen.last.grid.ravel(), share[: seen.last.grid.size], atol=EXACT, rtol=0)
    assert seen.last.prompts == pytest.approx(share[-lengths[-1] :].sum())


def literal_last_shares(backbone: Backbone, params: dict[str, Tensor], lens: Lens, x: Tensor) -> np.ndarray:
    """Of CLS' in the last block: to the patches, itself, the prompts; the mean over the heads."""
    block, lanes = backbone.blocks[-1], vit.lanes_of(backbone, x, condition(lens, 1))
    with torch.inference_mode():
        for index, each in enumerate(backbone.blocks[:-1]):
            vit._start(lanes, backbone.spec, index)
            vit._block(each, [lane for lane in lanes if lane.start <= index], index)
        vit._start(lanes, backbone.spec, backbone.spec.depth - 1)
        cls, image = (block.norm1(lanes[at].x) for at in (1, 0))
        low = params["query.down"].shape[0] // sum(map(bool, lens.prefix_lengths))
        query = block.query(cls) + cls @ params["query.down"][-low:].T @ params["query.up"][-low:]
        keys = torch.cat((block.keys_values(image[:, 1:])[0], block.keys_values(cls)[0], lens.keys[-1][None]), dim=1)
        query, keys = (part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in (query, keys))
        return (query @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)[0, :, 0].mean(0).numpy()


def test_a_served_reader_answers_as_the_literal_forward(backbone: Backbone) -> None:
    bench, task = Bench(backbone), a_task("readonly", (3, 1, 5, 2), 3, 7)
    [row] = bench.engine.run([(picture(3), bench.seat(task.lens(backbone)))])
    np.testing.assert_allclose(row, truth(backbone, task, picture(3)), atol=EXACT, rtol=0)


def test_the_bench_prints_and_saves_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "readers.json"
    bench.main(["--arch", "test_vit", "--rounds", "1", "--most", "10", "--batch", "2", "--json", str(file)])
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert {count: set(times) for count, times in result["serving"].items()} == {
        each: {"linear", "readonly", "vpt_deep"} for each in ("1", "10")
    }
    assert set(result["pictures_per_s"]) == {"readonly, trunk kept", "readonly", "vpt_deep"}
    assert all(name in printed for name in ("| 10 |", "readonly, trunk kept", "pictures / CPU s"))
