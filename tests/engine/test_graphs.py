"""Recorded forwards give the ordinary forward's answers: buckets, padding, tables and rules, on any device.

What CUDA itself does is `make gpu-check`'s to tell; here the work that would be recorded is run again instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.app import instrumentation
from server.app.engine_runtime import record_graphs
from server.engine import graphs as module
from server.engine.backbone import Backbone
from server.engine.batch import Work
from server.engine.engine import Engine
from server.engine.graph_recording import record_buckets
from server.engine.graphs import Graphs, buckets
from server.engine.recorder import CudaRecorder, Recorder, Rerun
from server.engine.residency import Seat
from server.observability import metrics
from server.settings import Settings
from tests.engine.fake_cuda import Watch, fake_cuda, on_fake_cuda
from tests.engine.golden_cases import Bench, Task, golden_backbone
from tests.engine.test_isolation import TASKS, a_task, picture

EXACT = 1e-9
MOST = 8
LENGTHS = (0, 8, 64)
WANTED = buckets(MOST, LENGTHS)
PREFIXED = ("vpt_deep", "linear", "mlp")


class Both:
    """One rack and two engines over it: with graphs and without."""

    def __init__(self, backbone: Backbone, recorder: Callable[[], Recorder] = Rerun) -> None:
        self.bench = Bench(backbone)
        self.graphs = record_buckets(backbone, self.bench.rack, recorder, WANTED)
        self.by_graph = Engine(backbone, self.bench.rack, self.graphs)
        self.seats = [self.bench.seat(_cast(task, backbone.dtype).lens(backbone)) for task in TASKS]

    def compare(self, work: list[Work], atol: float = EXACT) -> None:
        for ordinary, graphed in zip(self.bench.engine.run(work), self.by_graph.run(work), strict=True):
            np.testing.assert_allclose(graphed, ordinary, atol=atol, rtol=0)


def _cast(task: Task, dtype: torch.dtype) -> Task:
    return replace(task, params={name: value.to(dtype) for name, value in task.params.items()})


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


@pytest.fixture(scope="module")
def kept(backbone: Backbone) -> Both:
    return Both(backbone)


@pytest.fixture
def both(backbone: Backbone) -> Both:
    return Both(backbone)


def of(both: Both, *methods: str) -> list[Seat]:
    return [seat for seat, task in zip(both.seats, TASKS, strict=True) if task.method in methods]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", range(1, 2 * MOST + 2))
def test_every_batch_size_is_answered_as_without_graphs(kept: Both, rows: int) -> None:
    """Of one method and of all of them, pictures each row's own, shared, and sent normalised; more rows than the
    largest graph takes, too."""
    shuffle = random.Random(rows)
    pictures = [picture(n) for n in range(rows)]
    kept.compare([(pictures[n], seat) for n, seat in enumerate(shuffle.choices(of(kept, *PREFIXED), k=rows))])
    shared = [pictures[0], pictures[-1], np.random.default_rng(rows).standard_normal((3, 64, 64), np.float32)]
    kept.compare([(shuffle.choice(shared), shuffle.choice(kept.seats)) for _ in range(rows)])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, len(TASKS) - 1)), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_any_batch_is(kept: Both, pairs: list[tuple[int, int]]) -> None:
    pictures = [picture(n) for n in range(4)]
    kept.compare([(pictures[image], kept.seats[task]) for image, task in pairs])
    assert kept.graphs.graphs, "none was disabled"


def test_in_float32_only_the_order_of_sums_differs() -> None:
    both = Both(golden_backbone("vit_nano", 101, torch.float32))
    both.compare([(picture(n), both.seats[n % 3 + 1]) for n in range(7)], atol=1e-4)
    both.compare([(picture(n), seat) for n, seat in enumerate(both.seats)], atol=1e-4)
    assert both.graphs.counts.by_graph > 7
    assert both.graphs.drift < 1e-5


def test_each_row_has_its_own_mean_and_std(both: Both, backbone: Backbone) -> None:
    lens, pixels = TASKS[0].lens(backbone), picture(1)
    both.compare([(pixels, both.bench.seat(lens, *norm)) for norm in ((0.5, 0.5), (0.4, 0.2), (0.0, 1.0))])
    assert both.graphs.counts.by_graph == 3


def test_padding_is_whatever_was_there_before(backbone: Backbone) -> None:
    """To the bit: three rows in a bucket of four behind a full batch are answered as in fresh buffers."""
    fresh, used = Both(backbone), Both(backbone)
    work: list[Work] = [(picture(n), fresh.seats[n]) for n in range(3)]
    same: list[Work] = [(pixels, used.seats[n]) for n, (pixels, _) in enumerate(work)]
    noise = [(np.full((64, 64, 3), 255, np.uint8), used.seats[2])] + [(picture(9 + n), used.seats[1]) for n in range(3)]
    used.by_graph.run(noise)
    for first, other in zip(fresh.by_graph.run(work), used.by_graph.run(same), strict=True):
        np.testing.assert_array_equal(first, other)


def test_lenses_come_and_go_without_a_new_recording(backbone: Backbone) -> None:
    made: list[object] = []

    class Counting(Rerun):
        def record(self, work: Callable[[], object]) -> Callable[[], object]:
            made.append(work)
            return super().record(work)

    both = Both(backbone, Counting)
    assert len(made) == len(WANTED)
    for seed in range(6):
        task = a_task("vpt_deep", (seed, 3, 0, 9 - seed), 3, 40 + seed)
        seat = both.bench.seat(task.lens(backbone))
        both.compare([(picture(seed), seat), (picture(seed + 1), both.seats[0])])
        both.bench.rack.free(seat.place)
    assert len(made) == len(WANTED)
    assert both.graphs.counts.beside == 0


# --- rules ------------------------------------------------------------------------------------------------------------


def test_prefixes_and_heads_go_by_graph_and_nothing_else(both: Both) -> None:
    for seat, task in zip(both.seats, TASKS, strict=True):
        expected = [0] if task.method in PREFIXED else []
        assert both.graphs.rows_by_graph([(picture(0), seat.mean, seat.std)], [(0, seat)]) == expected, task.method


def test_heads_stay_with_the_readers_that_they_share_the_trunk_with(both: Both) -> None:
    linear, reader, deep = (of(both, method)[0] for method in ("linear", "readonly", "vpt_deep"))
    images = [(picture(0), linear.mean, linear.std)]
    assert both.graphs.rows_by_graph(images, [(0, linear), (0, deep)]) == [0, 1]
    assert both.graphs.rows_by_graph(images, [(0, linear), (0, reader), (0, deep)]) == [2]


def test_pictures_that_came_normalised_and_prompts_beyond_the_longest_bucket_do_not(
    both: Both, backbone: Backbone
) -> None:
    deep = of(both, "vpt_deep")[0]
    assert both.graphs.rows_by_graph([(np.zeros((3, 64, 64), np.float32), deep.mean, deep.std)], [(0, deep)]) == []
    longer = both.bench.seat(a_task("vpt_deep", (0, 65, 1, 0), 3, 5).lens(backbone))
    assert both.graphs.rows_by_graph([(picture(0), deep.mean, deep.std)], [(0, longer), (0, deep)]) == [1]
    both.compare([(picture(0), longer), (picture(0), deep)])


def test_the_smallest_graph_that_has_room_is_taken(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed: list[tuple[int, int]] = []
    features = module.Graph.features
    monkeypatch.setattr(
        module.Graph, "features", lambda graph, *rest: graphed.append(graph.bucket) or features(graph, *rest)
    )
    short, long, head = both.seats[0], both.seats[2], both.seats[5]  # prompts of 5, of 60 and none
    for seats in ([head], [short, head], [short] * 3, [long, short, head], [head] * 9, [short] * 8 + [long]):
        both.by_graph.run([(picture(n), seat) for n, seat in enumerate(seats)])
    assert graphed == [(1, 0), (2, 8), (4, 8), (4, 64), (8, 0), (1, 0), (8, 64), (1, 64)]


def test_buckets_are_powers_of_two_and_the_most() -> None:
    assert buckets(6, (0, 4)) == [(6, 4), (6, 0), (4, 4), (4, 0), (2, 4), (2, 0), (1, 4), (1, 0)]
    assert buckets(1, (3,)) == [(1, 3)]
    assert [rows for rows, _ in buckets(32, (0,))] == [32, 16, 8, 4, 2, 1]


# --- what is not as it should be --------------------------------------------------------------------------------------


class Forgetting(Rerun):
    """Runs once: the first batch's features for ever."""

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        work()
        return lambda: None


class Failing(Rerun):
    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("recorder", [Forgetting, Failing, lambda: CudaRecorder(torch.device("cpu"))])
def test_graphs_that_answer_otherwise_or_cannot_be_recorded_do_not_serve(
    backbone: Backbone, recorder: Callable[[], Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    both = Both(backbone, recorder)
    assert not both.graphs.graphs
    assert both.graphs.counts.refused == len(WANTED)
    assert "CUDA graph" in caplog.text
    both.bench.rack.check_integrity()
    both.compare([(picture(n), seat) for n, seat in enumerate(both.seats)])


@pytest.mark.parametrize("spoilt", ["numbers", "seen", "picture", "norms"])
def test_the_check_at_start_sees_a_table_that_does_not_come(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    forward = module.Graph._forward

    def spoiling(graph: module.Graph) -> None:
        getattr(graph._buffers, spoilt).zero_()
        forward(graph)

    monkeypatch.setattr(module.Graph, "_forward", spoiling)
    bench = Bench(backbone)
    assert not record_buckets(backbone, bench.rack, Rerun, [(4, 8)]).graphs


def test_a_graph_that_fails_later_is_given_up_and_its_rows_are_answered(both: Both) -> None:
    work: list[Work] = [(picture(n), both.seats[n]) for n in range(3)]
    for graph in both.graphs.graphs.values():
        graph._replay = _raise
    both.compare(work)
    assert not both.graphs.graphs
    assert both.graphs.counts.refused == len(WANTED)
    both.compare(work)


def _raise() -> None:
    raise RuntimeError("CUDA error: an illegal instruction was encountered")


def test_a_batch_without_memory_is_halved_by_the_caller_and_costs_no_graph(both: Both) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for graph in both.graphs.graphs.values():
        graph._replay = full
    with pytest.raises(torch.OutOfMemoryError):
        both.by_graph.run([(picture(0), both.seats[0])])
    assert len(both.graphs.graphs) == len(WANTED)


def test_a_rack_whose_memory_moved_is_noticed(both: Both) -> None:
    both.bench.rack._slab = both.bench.rack._slab.clone()
    both.compare([(picture(n), both.seats[n]) for n in range(3)])
    assert not both.graphs.graphs


def test_a_rack_too_small_for_a_bucket_goes_without_it(backbone: Backbone) -> None:
    small = Bench(backbone, vectors=2 * 4 * 8 + 70)  # one lens of 8 prompts, none of 64
    graphs = record_buckets(backbone, small.rack, Rerun, WANTED)
    assert {prompts for _, prompts in graphs.graphs} == {0, 8}
    assert graphs.counts.refused == 0
    small.rack.check_integrity()


def test_on_a_cpu_the_setting_costs_nothing_but_a_line_in_the_log(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(backbone)
    assert record_graphs(Settings(max_batch=4), backbone, bench.rack) is None, "off by default"
    graphs = record_graphs(Settings(max_batch=4, cuda_graphs=True), backbone, bench.rack)
    assert graphs is not None
    assert "there are no graphs on this device" in caplog.text
    refused = metrics.REGISTRY.get_sample_value("lensrack_cuda_graphs", {"state": "refused"})
    assert refused == graphs.counts.refused == len(buckets(4))


def test_rows_are_counted_by_the_way_they_went(both: Both) -> None:
    instrumentation.cuda_graphs(both.graphs)
    output = [metrics.GRAPH_ROWS.labels(way) for way in ("graph", "beside")]
    before = [counter._value.get() for counter in output]
    both.by_graph.run([(picture(n), seat) for n, seat in enumerate(both.seats)])
    gone = [counter._value.get() - start for counter, start in zip(output, before, strict=True)]
    assert sum(gone) == len(both.seats)
    assert gone == [both.graphs.counts.by_graph, both.graphs.counts.beside]
    serving = metrics.REGISTRY.get_sample_value("lensrack_cuda_graphs", {"state": "serving"})
    assert serving == len(WANTED)


def test_what_is_recorded_touches_the_device_alone(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there: between the copies in and the copy out nothing crosses, and nothing waits."""
    watch = Watch()
    with fake_cuda(monkeypatch):
        there = on_fake_cuda(backbone)
        bench = Bench(there)
        for bucket in WANTED:
            graph = module.Graph(there, bench.rack.slab, bucket, Rerun())
            with watch:
                graph._replay()
    assert (watch.there, watch.back) == (0, 0)


def test_a_batch_by_graph_waits_for_nothing_but_its_answers(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenses = [TASKS[n].lens(backbone) for n in (0, 2, 5)]
    with fake_cuda(monkeypatch):
        bench = Bench(on_fake_cuda(backbone))
        slab = bench.rack.slab
        graphs = Graphs(bench.rack, slab, {(4, 64): module.Graph(bench.backbone, slab, (4, 64), Rerun())})
        engine, seats = Engine(bench.backbone, bench.rack, graphs), [bench.seat(lens) for lens in lenses]
        with Watch() as watch:
            wait = engine.begin([(picture(n), seat) for n, seat in enumerate(seats)])
        assert len(wait()) == 3
    assert graphs.counts.by_graph == 3
    assert watch.back == 1
