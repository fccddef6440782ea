"""Products in 8 bits: the numbers that are multiplied, where they are, and who may not have them."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from server.app.backbone import load_backbone
from server.bench import precision
from server.engine import float8
from server.engine.backbone import Backbone, BackboneError, load
from server.engine.float8 import Float8Linear, rounded
from server.engine.vit import project
from server.settings import Settings
from tests.engine.fake_cuda import Watch, fake_cuda, on_fake_cuda
from tests.engine.golden_cases import NANO, Bench, Task, _weights, golden_backbone
from tests.engine.test_isolation import TASKS, picture

ROWS = arrays(np.float32, (3, 16), elements=st.floats(-1e4, 1e4, width=32))


def eye_in(dtype: torch.dtype, *, in_8_bits: bool) -> Backbone:
    model = VisionTransformer(**NANO, num_classes=0)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in _weights("vit_nano", 101).items()})
    return Backbone.of("vit_nano", model, dtype=dtype, packed=False, float8=in_8_bits)


def emulated(linear: Float8Linear, x: Tensor) -> Tensor:
    """What a product in 8 bits is: both sides rounded, then multiplied in float64."""
    flat, scale = rounded(x.reshape(-1, x.shape[-1]))
    weight, weight_scale = rounded(linear._weight)
    product = (flat.double() * scale.double()) @ (weight.double() * weight_scale.double()).t()
    product = product if linear._bias is None else product + linear._bias.double()
    return product.view(*x.shape[:-1], -1).to(x.dtype)


@given(ROWS)
@settings(deadline=None)
def test_rounding_moves_a_number_by_a_sixteenth_at_most(x: np.ndarray) -> None:
    """Three bits of fraction; below the smallest normal number by half of the smallest step."""
    given_ = torch.from_numpy(x)
    product, scale = rounded(given_)
    moved = (product.double() * scale.double() - given_.double()).abs()
    assert (moved <= torch.maximum(given_.double().abs() / 16, scale.double() * 2**-10) * 1.001).all()
    assert (product.float().abs().amax(1)[given_.abs().amax(1) > 1e-6] == float8.LARGEST).all()


def test_nothing_stays_nothing() -> None:
    product, scale = rounded(torch.zeros(2, 16))
    assert not product.float().any()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_the_rounded_numbers(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 32, generator=generator), torch.randn(2, 5, 32, generator=generator) * 7
    linear = Float8Linear(weight, torch.randn(48, generator=generator) if bias else None)
    expected, base = emulated(linear, x), torch.randn(2, 5, 48, generator=generator)
    torch.testing.assert_close(linear(x), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(linear.onto(base, x), base + expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(linear.gelu(x), F.gelu(expected), atol=1e-4, rtol=1e-5)
    assert (linear(x) - linear.exact(x)).abs().max() > 1e-2, "8 bits are not 32"
    torch.testing.assert_close(linear.product(x), F.linear(x, weight))
    recorded = x.clone().requires_grad_(True)
    assert torch.equal(linear(recorded), linear.exact(recorded)), "a gradient is that of the numbers themselves"


def test_each_row_and_each_output_has_a_scale_of_its_own() -> None:
    """A neighbour of any size changes nothing."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 16, generator=generator), torch.randn(4, 16, generator=generator)
    linear = Float8Linear(weight, None)
    loud = torch.cat((x, torch.full((1, 16), 1e6)))
    torch.testing.assert_close(linear(loud)[:4], linear(x), atol=0, rtol=0)


def test_the_forward_in_8_bits_is_that_of_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """All methods in one batch; and that is further from float32 than nothing, and less far than a change of mind."""
    answers = {in_8_bits: _answers(eye_in(torch.float32, in_8_bits=in_8_bits)) for in_8_bits in (True, False)}
    monkeypatch.setattr(Float8Linear, "__call__", emulated)
    expected = _answers(eye_in(torch.float32, in_8_bits=True))
    assert _drift(answers[True], expected) < 0.02  # a sum in another order may be rounded to the next number
    assert 0.01 < _drift(answers[True], answers[False]) < 0.5


def _answers(backbone: Backbone) -> list[np.ndarray]:
    bench = Bench(backbone)
    cast = [
        Task(task.method, {name: value.to(backbone.dtype) for name, value in task.params.items()}, task.lengths)
        for task in TASKS
    ]
    seats = [bench.seat(task.lens(backbone)) for task in cast]
    return bench.engine.run([(picture(n % 3), seat) for n, seat in enumerate(seats)])


def _drift(first: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Root of the mean square, in standard deviations."""
    a, b = np.concatenate(first), np.concatenate(other)
    return float(np.sqrt(((a - b) ** 2).mean()) / b.std())


def test_a_lens_has_nothing_of_8_bits() -> None:
    prompts = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    backbones = [eye_in(torch.float32, in_8_bits=in_8_bits) for in_8_bits in (True, False)]
    for block, other in zip(*(backbone.blocks for backbone in backbones), strict=True):
        for first, expected in zip(project(block, prompts), project(other, prompts), strict=True):
            torch.testing.assert_close(first, expected)


def test_in_8_bits_nothing_waits_either(monkeypatch: pytest.MonkeyPatch) -> None:
    lenses = [TASKS[n].lens(golden_backbone("vit_nano", 101, torch.float64)) for n in (0, 3, 5)]
    with fake_cuda(monkeypatch):
        bench = Bench(on_fake_cuda(golden_backbone("vit_nano", 101, torch.float64), float8=True))
        seats = [bench.seat(lens) for lens in lenses]
        with Watch() as watch:
            bench.engine.begin([(picture(n), seat) for n, seat in enumerate(seats)])
    assert watch.back == 1


# --- who may not have it ----------------------------------------------------------------------------------------------


def test_a_cpu_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"float8: expected a CUDA device of capability 8\.9 or newer, got cpu"):
        load("untrained", device="cpu", dtype="float8")


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_what_a_device_must_be_capable_of(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (float8.unsupported_device(torch.device("cuda", 0)) is not None) == refused


def test_odd_widths_are_refused() -> None:
    model = timm.create_model("test_vit", num_classes=0, embed_dim=72, num_heads=4)
    with pytest.raises(BackboneError, match=r"widths are multiples of 16, got \[72, "):
        Backbone.of("test_vit", model, float8=True)


def test_workers_fit_as_if_nothing_had_been_said() -> None:
    requested = Settings(backbone="untrained", device="cpu", dtype="float8", threads=1)
    threads = torch.get_num_threads()
    assert load_backbone(requested, threads, training=True).precision == "float32"
    with pytest.raises(BackboneError, match="float8"):
        load_backbone(requested, threads)


def test_a_backbone_says_what_it_multiplies_in() -> None:
    assert eye_in(torch.bfloat16, in_8_bits=True).precision == "float8"
    assert eye_in(torch.bfloat16, in_8_bits=False).precision == "bfloat16"


def test_what_rounding_costs_a_bundled_task_is_told() -> None:
    """On real pictures: a few of those that `bench precision` asks about."""
    pytest.importorskip("sklearn")
    rows = {row.precision: row for row in precision.measure("digits", 8)}
    assert rows["float32"].drift == 0
    assert 0 < rows["bfloat16"].drift < rows["float8"].drift < 0.6
    assert rows["float8"].agree > 0.7
    assert "| digits | float8 | 8 |" in precision.table(list(rows.values()))
