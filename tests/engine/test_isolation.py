"""A row's answer does not depend on what else is in its batch, and no neighbour can make it so."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from server.engine import reference, vit
from server.engine.backbone import Backbone
from server.engine.batch import normalise
from server.engine.residency import Seat
from server.methods.registry import Registry
from tests.engine.golden_cases import Bench, Task, golden_backbone

EXACT = 1e-9


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float64)


def a_task(method: str, lengths: tuple[int, ...], classes: int, seed: int, scale: float = 1.0) -> Task:
    backbone = golden_backbone("vit_nano", 101, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    params = Registry().get(method).init(backbone.spec, lengths, classes, generator)
    params = {name: torch.randn(value.shape, generator=generator).double() * scale for name, value in params.items()}
    return Task(method, params, lengths)


def picture(seed: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def truth(backbone: Backbone, case: Task, pixels: np.ndarray, mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    """The literal forward of one task on one picture."""
    stack = torch.from_numpy(pixels[None])
    images = normalise(stack, torch.tensor([[mean] * 3]), torch.tensor([[std] * 3]), torch.float64)
    with torch.inference_mode():
        return reference.logits(case.method, backbone, images, case.params, case.lengths)[0].numpy()


TASKS = [
    a_task("vpt_deep", (3, 0, 5, 2), 4, 1),
    a_task("vpt_deep", (0, 0, 0, 7), 9, 2),
    a_task("vpt_deep", (60, 60, 60, 60), 2, 3),
    a_task("vpt_shallow", (5, 0, 0, 0), 3, 4),
    a_task("vpt_shallow", (1, 0, 0, 0), 30, 5),
    a_task("linear", (0, 0, 0, 0), 6, 6),
    a_task("linear", (0, 0, 0, 0), 2, 7),
    a_task("bias", (0, 0, 0, 0), 5, 8),
    a_task("bias", (0, 0, 0, 0), 2, 9),
    a_task("prompt_bias", (3, 0, 5, 2), 4, 10),
    a_task("cvpt", (2, 0, 3, 1), 5, 11),
    a_task("cvpt", (0, 4, 20, 1), 2, 12),
    a_task("cvpt", (5, 1, 0, 2), 3, 19),
    a_task("lora", (2, 0, 3, 1), 5, 13),
    a_task("lora", (1, 9, 0, 0), 2, 14),
    a_task("adapter", (4, 0, 2, 1), 5, 15),
    a_task("adapter", (0, 1, 12, 0), 2, 16),
    a_task("memory", (3, 0, 6, 1), 5, 17),
    a_task("memory", (0, 8, 1, 0), 2, 18),
    a_task("readonly", (3, 0, 5, 2), 5, 22),
    a_task("readonly", (1, 1, 1, 8), 2, 23),
    a_task("readonly", (0, 0, 4, 1), 3, 24),
    a_task("mlp", (0, 0, 0, 0), 4, 20),
    a_task("mlp", (0, 0, 0, 0), 11, 21),
]


def test_every_composition_of_a_batch_gives_the_literal_answers(backbone: Backbone) -> None:
    bench = Bench(backbone)
    seats = [bench.seat(case.lens(backbone)) for case in TASKS]
    pictures = [picture(n) for n in range(4)]
    pairs = list(itertools.product(range(len(pictures)), range(len(TASKS))))
    answers = {pair: truth(backbone, TASKS[pair[1]], pictures[pair[0]]) for pair in pairs}
    shuffle = random.Random(0)
    for size in (1, 2, 3, 7, len(pairs)):
        for _ in range(6):
            batch = shuffle.sample(pairs, size)
            for pair, row in zip(batch, bench.engine.run([(pictures[i], seats[t]) for i, t in batch]), strict=True):
                np.testing.assert_allclose(row, answers[pair], atol=EXACT, rtol=0)


@pytest.mark.parametrize("most", [1, 3, 5])
def test_rows_that_go_some_after_the_others_are_answered_literally(
    backbone: Backbone, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU, where all rows at once would not stay in its cache; readers go together, whose trunk is one."""
    bench, parts = Bench(backbone), []
    forward_lanes = vit.forward_lanes

    def counted(backbone: Backbone, lanes: Sequence[vit.Lane]) -> list[torch.Tensor]:
        features = forward_lanes(backbone, lanes)
        parts.append(sum(map(len, features)))
        return features

    monkeypatch.setattr(vit, "forward_lanes", counted)
    monkeypatch.setattr(bench.engine, "_rows_per_pass", most)
    readers = {at for at, case in enumerate(TASKS) if case.method == "readonly"}
    seats, pictures = [bench.seat(case.lens(backbone)) for case in TASKS], [picture(n) for n in range(2)]
    pairs = list(itertools.product(range(2), range(len(TASKS))))
    random.Random(1).shuffle(pairs)
    for batch in (pairs, [pair for pair in pairs if pair[1] not in readers]):
        parts.clear()
        for (shown, task), row in zip(
            batch, bench.engine.run([(pictures[i], seats[t]) for i, t in batch]), strict=True
        ):
            np.testing.assert_allclose(row, truth(backbone, TASKS[task], pictures[shown]), atol=EXACT, rtol=0)
    assert max(parts) <= most, "without readers"
    assert len(parts) > 5


def test_a_cpu_takes_as_many_rows_at_once_as_its_cache_holds(backbone: Backbone) -> None:
    row = backbone.spec.tokens * backbone.spec.hidden * 8
    assert Bench(backbone).engine._rows_per_pass == torch.get_num_threads() * max(4, int(2.5 * 2**20 // row))


def test_pictures_that_came_normalised_are_answered_literally_beside_others(backbone: Backbone) -> None:
    """The same numbers go into the literal forward; a neighbour's mean and std do not touch them."""
    bench = Bench(backbone)
    seats = [bench.seat(case.lens(backbone)) for case in TASKS]
    sent = [np.random.default_rng(n).standard_normal((3, 64, 64), np.float32) for n in range(2)]
    work = [(pixels, at) for at in range(len(TASKS)) for pixels in (sent[at % 2], picture(at % 3))]
    for share in (work, [row for row in work if row[0].dtype == np.float32]):
        answers = bench.engine.run([(pixels, seats[at]) for pixels, at in share])
        for (pixels, at), row in zip(share, answers, strict=True):
            case = TASKS[at]
            if pixels.dtype == np.float32:
                images = torch.from_numpy(pixels[None]).double()
                with torch.inference_mode():
                    expected = reference.logits(case.method, backbone, images, case.params, case.lengths)[0].numpy()
            else:
                expected = truth(backbone, case, pixels)
            np.testing.assert_allclose(row, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_neighbours_change_nothing(backbone: Backbone, scale: float) -> None:
    """Prompts of enormous size saturate their own softmax only."""
    bench = Bench(backbone)
    quiet = [bench.seat(case.lens(backbone)) for case in TASKS]
    loud = [
        bench.seat(a_task("vpt_deep", (9, 9, 9, 9), 3, 11, scale).lens(backbone)),
        bench.seat(a_task("vpt_shallow", (9, 0, 0, 0), 3, 12, scale).lens(backbone)),
    ]
    work = [(picture(n), seat) for n in range(3) for seat in (*loud, *quiet, *loud)]
    for (pixels, seat), row in zip(work, bench.engine.run(work), strict=True):
        if seat in quiet:
            np.testing.assert_allclose(row, truth(backbone, TASKS[quiet.index(seat)], pixels), atol=EXACT, rtol=0)


def test_what_sat_in_a_slot_before_leaves_no_trace(backbone: Backbone) -> None:
    """Evicted and reused vectors: fill the rack with huge lenses, free them, seat another, mix it with padding."""
    bench = Bench(backbone, slots=4, vectors=700)
    for round_ in range(5):
        loud = [bench.seat(a_task("vpt_deep", (20,) * 4, 9, round_, 1e6).lens(backbone)) for _ in range(3)]
        for seat in loud:
            bench.rack.free(seat.place)
        short, long = TASKS[0], a_task("vpt_deep", (11, 4, 0, 8), 5, 99)
        seats: list[tuple[Seat, Task]] = [
            (bench.seat(short.lens(backbone)), short),
            (bench.seat(long.lens(backbone)), long),
        ]
        pixels = picture(round_)
        for (seat, case), row in zip(seats, bench.engine.run([(pixels, s) for s, _ in seats]), strict=True):
            np.testing.assert_allclose(row, truth(backbone, case, pixels), atol=EXACT, rtol=0)
            bench.rack.free(seat.place)
        bench.rack.check_integrity()


def test_each_row_is_normalised_with_its_own_mean_and_std(backbone: Backbone) -> None:
    bench = Bench(backbone)
    case, pixels = TASKS[0], picture(1)
    lens = case.lens(backbone)
    seats = [bench.seat(lens, 0.5, 0.5), bench.seat(lens, 0.4, 0.2), bench.seat(lens, 0.0, 1.0)]
    rows = bench.engine.run([(pixels, seat) for seat in seats])
    for (mean, std), row in zip(((0.5, 0.5), (0.4, 0.2), (0.0, 1.0)), rows, strict=True):
        np.testing.assert_allclose(row, truth(backbone, case, pixels, mean, std), atol=1e-6, rtol=0)


def test_head_only_tasks_on_one_picture_share_one_trunk_row(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(backbone)
    heads = [bench.seat(a_task(("linear", "mlp")[n % 2], (0,) * 4, 3 + n, n).lens(backbone)) for n in range(10)]
    deep = bench.seat(TASKS[0].lens(backbone))
    rows: list[int] = []
    features = bench.engine._features
    counted = lambda x, trunk, way: rows.append(len(trunk)) or features(x, trunk, way)  # noqa: E731
    monkeypatch.setattr(bench.engine, "_features", counted)
    pixels = picture(0)
    answers = bench.engine.run([(pixels, seat) for seat in (*heads, deep, deep)])
    assert rows == [2], "ten heads share the plain trunk, two rows of one prompted task share the other"
    np.testing.assert_array_equal(answers[-1], answers[-2])
    alone = bench.engine.run([(pixels, heads[3])])[0]
    np.testing.assert_allclose(answers[3], alone, atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    "pixels", [np.full((64, 64, 3), np.nan), np.zeros((96, 96, 3), np.uint8), np.zeros((64, 64), np.uint8)]
)
def test_only_bytes_of_the_right_size_come_in(backbone: Backbone, pixels: np.ndarray) -> None:
    bench = Bench(backbone)
    seat = bench.seat(TASKS[0].lens(backbone))
    with pytest.raises(ValueError, match=r"expected uint8 \[64, 64, 3\]"):
        bench.engine.run([(picture(0), seat), (pixels, seat)])


def test_the_answer_depends_on_the_image_and_on_the_task(backbone: Backbone) -> None:
    """A forward that ignored either would pass every test of sameness."""
    bench = Bench(backbone)
    first, second = (
        bench.seat(TASKS[0].lens(backbone)),
        bench.seat(a_task("vpt_deep", (3, 0, 5, 2), 4, 77).lens(backbone)),
    )
    one, other, third = bench.engine.run([(picture(0), first), (picture(1), first), (picture(0), second)])
    assert np.abs(one - other).max() > 0.01
    assert np.abs(one - third).max() > 0.01
