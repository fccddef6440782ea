"""What methods add to the blocks: equal to the literal forward with its gradients, on every kind of backbone; free of
charge where nothing is added; and the rack's memory stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from server.engine import reference, vit
from server.engine.additions import Additions
from server.engine.backbone import Backbone
from server.engine.lens import condition
from server.methods.method import Params
from server.methods.registry import Registry
from tests.engine.golden_cases import Bench, golden_backbone
from tests.engine.test_isolation import TASKS, a_task, picture, truth
from tests.engine.test_packed import KINDS, a_backbone, images, needs_bfloat16, needs_float32, similarity

METHODS = {
    "mlp": (0, 0, 0),
    "bias": (0, 0, 0),
    "prompt_bias": (3, 0, 5),
    "cvpt": (4, 0, 2),
    "lora": (2, 0, 3),
    "adapter": (4, 0, 1),
    "memory": (0, 5, 2),
    "readonly": (3, 0, 2),
}
ALL_KINDS = {
    **KINDS,
    "pre-norm": {"pre_norm": True},
    "mean pooling behind the norm": {"global_pool": "avg", "fc_norm": False},
}
MANY = [task for task in TASKS if task.method in METHODS]
HEADS = ("linear", "mlp")  # they add nothing to the trunk


def drawn(backbone: Backbone, method: str, lengths: Sequence[int]) -> Params:
    shapes = Registry().get(method).shapes(backbone.spec, tuple(lengths), 5)
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator).to(backbone.dtype) * 0.3 for name, shape in shapes.items()}


def by_lens(backbone: Backbone, method: str, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    lens = Registry().get(method).lower(backbone, params, tuple(lengths))
    return vit.classify(vit.forward(backbone, vit.embed(backbone, pixels), condition(lens, len(pixels))), lens)


def by_rack(backbone: Backbone, method: str, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    bench = Bench(backbone)
    with torch.inference_mode():
        seat = bench.seat(Registry().get(method).lower(backbone, params, tuple(lengths)))
        return torch.stack(
            bench.engine.logits(vit.embed(backbone, pixels), [(row, seat) for row in range(len(pixels))])
        )


@pytest.mark.parametrize("path", [by_lens, by_rack])
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_answers_are_the_literal_ones(method: str, kind: str, path: object) -> None:
    backbone, lengths = a_backbone(torch.float64, False, **ALL_KINDS[kind]), METHODS[method]
    params, pixels = drawn(backbone, method, lengths), images(3).double()
    with torch.inference_mode():
        expected = reference.logits(method, backbone, pixels, params, lengths)
        result = path(backbone, method, pixels, params, lengths)
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_are_the_literal_ones(method: str, kind: str) -> None:
    backbone, lengths = a_backbone(torch.float64, False, **ALL_KINDS[kind]), METHODS[method]
    result, expected = ({k: v.requires_grad_() for k, v in drawn(backbone, method, lengths).items()} for _ in range(2))
    (by_lens(backbone, method, images(2).double(), result, lengths) ** 2).sum().backward()
    (reference.logits(method, backbone, images(2).double(), expected, lengths) ** 2).sum().backward()
    for name, parameter in expected.items():
        assert parameter.grad is not None
        torch.testing.assert_close(
            result[name].grad, parameter.grad, atol=1e-9 * float(parameter.grad.abs().max()), rtol=1e-7
        )
    assert sum(parameter.grad.abs().max() > 0 for parameter in expected.values()) >= len(expected) - 1
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@needs_float32
@pytest.mark.parametrize("method", METHODS)
def test_packed_answers_and_gradients_are_the_plain_ones(method: str) -> None:
    lengths = METHODS[method]
    plain, packed = (a_backbone(torch.float32, packing) for packing in (False, True))
    answers, gradients = [], []
    for backbone in (plain, packed):
        params = {name: value.requires_grad_() for name, value in drawn(backbone, method, lengths).items()}
        answers.append(by_lens(backbone, method, images(3), params, lengths))
        (answers[-1] ** 2).sum().backward()
        gradients.append({name: value.grad for name, value in params.items()})
    torch.testing.assert_close(answers[1], answers[0], atol=2e-5 * float(answers[0].detach().abs().max()), rtol=0)
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-5 * float(gradient.abs().max()), rtol=0)


@needs_bfloat16
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_answers_are_close(method: str) -> None:
    wide, narrow = a_backbone(torch.float32, False), a_backbone(torch.bfloat16, True)
    lengths = METHODS[method]
    with torch.inference_mode():
        result, expected = (
            by_rack(backbone, method, images(8).to(backbone.dtype), drawn(backbone, method, lengths), lengths).float()
            for backbone in (narrow, wide)
        )
    assert similarity(result, expected) > 0.99


def test_huge_additions_of_a_neighbour_change_nothing() -> None:
    """Loud rows of every method around quiet ones, of the same method (one lane, padded) and of others."""
    backbone = an_isolated_eye()
    bench = Bench(backbone)
    quiet = [bench.seat(task.lens(backbone)) for task in TASKS]
    loud = [bench.seat(a_task(task.method, task.lengths, 3, 50 + n, 1e4).lens(backbone)) for n, task in enumerate(MANY)]
    work = [(picture(n), seat) for n in range(2) for seat in (*loud, *quiet, *loud)]
    for (pixels, seat), row in zip(work, bench.engine.run(work), strict=True):
        if seat in quiet:
            np.testing.assert_allclose(row, truth(backbone, TASKS[quiet.index(seat)], pixels), atol=1e-9, rtol=0)


def test_lenses_come_and_go_and_the_racks_memory_stays() -> None:
    """Whatever sat in a vector or beside it before: freed huge, written anew, answered as if it were alone."""
    backbone = an_isolated_eye()
    bench = Bench(backbone, slots=6, vectors=1200)
    rack, pixels = bench.rack, picture(3)
    where = (rack._slab.data_ptr(), rack._bias.data_ptr())
    for round_, task in enumerate(MANY * 2):
        loud = [bench.seat(a_task(other.method, other.lengths, 3, round_, 1e4).lens(backbone)) for other in MANY[:3]]
        for seat in loud:
            rack.free(seat.place)
        seats = [bench.seat(task.lens(backbone)), bench.seat(TASKS[0].lens(backbone))]
        first, second = bench.engine.run([(pixels, seat) for seat in seats])
        np.testing.assert_allclose(first, truth(backbone, task, pixels), atol=1e-9, rtol=0)
        np.testing.assert_allclose(second, truth(backbone, TASKS[0], pixels), atol=1e-9, rtol=0)
        rack.check_integrity()
        for seat in seats:
            rack.free(seat.place)
    assert rack.used_vectors == 0
    assert where == (rack._slab.data_ptr(), rack._bias.data_ptr())


def test_rows_that_add_nothing_are_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of addition has a lane of its own: rows of other methods never see its work."""
    backbone = an_isolated_eye()
    bench = Bench(backbone)
    seats = [bench.seat(task.lens(backbone)) for task in TASKS]
    rows: list[int] = []
    gathered = Additions.to_qkv

    def note(self: Additions, normed: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows.append(len(normed))
        return gathered(self, normed, *parts)

    monkeypatch.setattr(Additions, "to_qkv", note)
    adds = [task.method in METHODS and task.method not in HEADS for task in TASKS]
    plain = [seat for seat, added in zip(seats, adds, strict=True) if not added]
    bench.engine.run([(picture(0), seat) for seat in plain])
    assert rows == []
    bench.engine.run([(picture(0), seat) for seat in seats])
    assert 0 < sum(rows) <= sum(adds) * backbone.spec.depth


def an_isolated_eye() -> Backbone:
    """The one that `a_task` draws for."""
    return golden_backbone("vit_nano", 101, torch.float64)
