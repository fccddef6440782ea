"""Ways that the ladder measures beside the engine's own: what they answer, in float64, and on a device not there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.bench import ladder_cuda, ladder_layouts, ladder_prompts
from server.bench.ladder_bench import (
    Answer,
    Bench,
    Drift,
    NotAvailable,
    exact_images,
    exact_images_ragged,
    exact_ragged,
    under,
)
from server.engine.backbone import Backbone
from server.engine.batch import ImageSeat
from server.engine.engine import Engine
from server.engine.gathered import Gathered
from server.engine.packed import can_pack
from tests.engine.fake_cuda import WaitsError, Watch, fake_cuda, on_fake_cuda

ROUNDED = 1e-9  # float64 against float64
needs_packed = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="PyTorch packs no weights here"
)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("vit_tiny_patch16_224", tasks=3, prompts=4)


@pytest.fixture(scope="module")
def backbone(bench: Bench) -> Backbone:
    return bench.backbone(torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the ladder runs; whoever takes more gives them back."""
    with ladder_layouts.using(1):
        yield
        assert torch.get_num_threads() == 1


def segments(query: Tensor, keys: Tensor, values: Tensor, *where: Any) -> Tensor:
    """What PyTorch's `varlen_attn` computes, written out: row by row, [ΣQ, H, d]."""
    starts, key_starts, queries, longest = where
    sizes = [np.diff(ends.tolist()).tolist() for ends in (starts, key_starts)]
    assert (max(sizes[0]), max(sizes[1])) == (queries, longest)
    assert starts.dtype == key_starts.dtype == torch.int32
    result = []
    for q, k, v in zip(query.split(sizes[0]), keys.split(sizes[1]), values.split(sizes[1]), strict=True):
        shares = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        result.append(torch.einsum("hqk,khd->qhd", shares, v))
    return torch.cat(result)


def row_by_row(bench: Bench, backbone: Backbone) -> Answer:
    attending = ladder_prompts.attending_unpadded
    return under(lambda: attending(ladder_prompts.row_by_row), bench.served(backbone, bench.ragged))


def test_lengths_differ_and_so_do_the_answers(bench: Bench) -> None:
    assert [lengths[0] for _, lengths in bench.ragged] == [0, 2, 4]
    assert Drift.of(bench.served(bench.plain)(), exact_ragged(bench)().numpy()).drift > 1e-2


RAGGED: dict[str, Callable[[Bench, Backbone], Answer]] = {
    "masked": lambda bench, backbone: bench.served(backbone, bench.ragged),
    "row by row": row_by_row,
}


@pytest.mark.parametrize("way", RAGGED)
def test_of_any_length_in_float64(bench: Bench, backbone: Backbone, way: str) -> None:
    drift = Drift.of(RAGGED[way](bench, backbone)(), exact_ragged(bench)().numpy())
    assert drift.drift < ROUNDED
    assert drift.agree == 1


def test_padding_that_is_not_masked_is_seen(bench: Bench, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gathered, "_mask", lambda gathered, layer: None)
    assert Drift.of(bench.served(backbone, bench.ragged)(), exact_ragged(bench)().numpy()).drift > 1e-3


def test_uint8_pictures_to_logits(bench: Bench, backbone: Backbone) -> None:
    for pinned in (True, False):
        answer = bench.from_images(backbone, bench.lenses(backbone, bench.even), pinned=pinned)
        assert Drift.of(answer(), exact_images(bench)().numpy()).drift < ROUNDED


def test_rows_end_to_end(bench: Bench, backbone: Backbone) -> None:
    result = ladder_cuda.unpadded_by(segments, bench, backbone)()
    assert Drift.of(result, exact_images_ragged(bench)().numpy()).drift < ROUNDED


def test_what_is_not_unpadded_is_refused(bench: Bench, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.vit._attention", ladder_prompts.row_by_row)
    with pytest.raises(TypeError, match="expected the condition Unpadded, got Gathered"):
        bench.served(backbone)()


# --- on a device that is not there ------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Answer]]:
    """`Bench.from_images` there; of what a lens holds only the shapes count. tasks: `even` or `ragged`."""
    lenses = {name: bench.lenses(bench.plain, getattr(bench, name)) for name in ("even", "ragged")}
    with fake_cuda(monkeypatch):
        backbone = on_fake_cuda(bench.plain)
        monkeypatch.setattr(
            bench, "lenses", lambda backbone, tasks: lenses["even" if tasks is bench.even else "ragged"]
        )
        yield lambda tasks, **how: bench.from_images(backbone, bench.lenses(backbone, tasks), **how)


def test_pinned_memory_waits_for_nothing_and_pageable_for_the_first_copy(
    bench: Bench, on_cuda: Callable[..., Answer]
) -> None:
    with Watch() as watch:
        assert on_cuda(bench.even)().shape == (3, 10)
    assert watch.back == 1
    with Watch(), pytest.raises(WaitsError):
        on_cuda(bench.even, pinned=False)()


def test_rows_end_to_end_wait_for_nothing_either(bench: Bench, on_cuda: Callable[..., Answer]) -> None:
    called = []

    def shapes(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
        called.append((query.shape[0], keys.shape[0], query.device.type, query.dtype))
        return torch.empty_like(query)

    attending = ladder_prompts.attending_unpadded(ladder_prompts.end_to_end(shapes))
    answer = on_cuda(bench.ragged)
    with Watch(), attending:
        assert answer().shape == (3, 10)
    keys = 3 * 197 + 0 + 2 + 4
    assert called == [(3 * 197, keys, "cuda", torch.bfloat16)] * 11 + [(3, keys, "cuda", torch.bfloat16)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_where_no_cuda_is_each_row_says_so(bench: Bench) -> None:
    for step in ladder_cuda.CUDA:
        with pytest.raises(NotAvailable, match="no CUDA"):
            step.start(bench)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "within", "engine_step"), [(1, [1], 1), (2, [1, 2], 1), (4, [1, 2, 3, 4], 3), (6, [1, 2, 4, 5, 6], 5)]
)
def test_as_many_threads_as_there_are_cores(cores: int, within: Sequence[int], engine_step: int) -> None:
    steps = ladder_layouts.layouts(cores)
    names = ["one thread", *(f"{count} threads in each product" for count in within[1:])]
    assert [step.name for step in steps[: len(within)]] == names
    assert [step.name for step in steps if step.taken] == [names[within.index(engine_step)]]
    assert len(steps) == 2 * len(within) - 1


@needs_packed
def test_threads_are_those_that_the_row_names(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Engine.logits, []

    def watched(engine: Engine, x: Tensor, rows: Sequence[ImageSeat]) -> list[Tensor]:
        seen.append((len(rows), torch.get_num_threads(), threading.get_ident()))
        return original(engine, x, rows)

    monkeypatch.setattr(Engine, "logits", watched)
    here = threading.get_ident()
    alone = ladder_layouts.within(bench, 1)()
    torch.testing.assert_close(ladder_layouts.within(bench, 2)(), alone, atol=1e-4, rtol=1e-4)
    assert seen == [(3, 1, here), (3, 2, here)]
    seen.clear()
    torch.testing.assert_close(ladder_layouts.workers(bench, 2)(), alone, atol=1e-4, rtol=1e-4)
    assert sorted(rows for rows, _, _ in seen) == [1, 2]
    assert all(threads == 1 and thread != here for _, threads, thread in seen)


@needs_packed
def test_more_workers_than_pictures_are_not_measured(bench: Bench) -> None:
    with pytest.raises(NotAvailable, match="fewer pictures than workers: 3"):
        ladder_layouts.workers(bench, 4)
