"""Packed weights: the plain answers and gradients, packed where the machine can and nowhere else; bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from server.app.backbone import load_backbone
from server.bench import engine as bench
from server.engine import attention, reference, vit
from server.engine import backbone as backbones
from server.engine.backbone import Backbone
from server.engine.block import FrozenBlock
from server.engine.lens import Plain, condition
from server.engine.packed import PackedLinear, PlainLinear, can_pack
from server.methods.method import Params
from server.methods.registry import Registry
from server.settings import Settings

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"img_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 0}
KINDS = {
    "class token": {},
    "mean pooling": {"global_pool": "avg", "class_token": False, "fc_norm": True},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "layer scale and qk-norm": {"init_values": 0.1, "qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
}
needs_float32 = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="PyTorch packs no float32 weights here")
needs_bfloat16 = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="PyTorch packs no bfloat16 weights here")


def a_backbone(dtype: torch.dtype, packed: bool, **options: object) -> Backbone:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, **options)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return Backbone.of("vit", model, dtype=dtype, packed=packed)


def some_params(backbone: Backbone, method: str, lengths: Sequence[int]) -> Params:
    drawn = Registry().get(method).init(backbone.spec, tuple(lengths), 5, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(value.shape, generator=generator) * 0.5 for name, value in drawn.items()}


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 64, 64, generator=torch.Generator().manual_seed(3))


# --- the choice -------------------------------------------------------------------------------------------------------


def kinds_of(block: FrozenBlock) -> set[type]:
    products = (block.query, block._keys_values, block.project, block.hidden, block._fc2)
    return {type(product) for product in products}


@needs_float32
@pytest.mark.parametrize(
    ("dtype", "requested", "packed"),
    [(torch.float32, True, True), (torch.float32, False, False), (torch.float64, True, False)],
)
def test_weights_are_packed_where_asked_and_possible(dtype: torch.dtype, requested: bool, packed: bool) -> None:
    backbone = a_backbone(dtype, requested)
    assert backbone.packed is packed
    assert all(kinds_of(block) == {PackedLinear if packed else PlainLinear} for block in backbone.blocks)


@needs_float32
@pytest.mark.parametrize("packed", [True, False])
def test_the_setting_decides(packed: bool) -> None:
    settings = Settings(packed=packed, device="cpu")
    assert load_backbone(settings, torch.get_num_threads()).packed is packed


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cuda", torch.float32), ("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.float16)],
)
def test_nothing_else_is_packed(device: str, dtype: torch.dtype) -> None:
    assert not can_pack(torch.device(device), dtype)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_a_build_of_pytorch_that_cannot_pack_multiplies_plainly(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> Tensor:
        raise error("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lacking)
    backbone = a_backbone(torch.float32, packed=True)
    assert not backbone.packed
    assert vit.forward(backbone, vit.embed(backbone, images(2)), Plain()).shape == (2, 64)


# --- one product ------------------------------------------------------------------------------------------------------


def products(rows: Sequence[int], bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(*rows, 48, generator=generator)
    weight = torch.randn(112, 48, generator=generator)
    return x, weight, torch.randn(112, generator=generator) if bias else None


@needs_float32
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (197,), (4, 50), (2, 3, 7)], ids=str)
def test_a_product_is_exact_to_rounding_for_any_rows(rows: tuple[int, ...], bias: bool) -> None:
    x, weight, own_bias = products(rows, bias)
    result = PackedLinear(weight, own_bias)(x)
    truth = F.linear(x.double(), weight.double(), None if own_bias is None else own_bias.double())
    torch.testing.assert_close(result.double(), truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [PlainLinear, pytest.param(PackedLinear, marks=needs_float32)])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_done_behind_a_product_on_the_way_is_exact_to_rounding(bias: bool, kind: type[PlainLinear]) -> None:
    x, weight, own_bias = products((2, 3, 7), bias)
    base = torch.randn(2, 3, 7, 112)
    product, kept = F.linear(x.double(), weight.double(), None if own_bias is None else own_bias.double()), base.clone()
    linear = kind(weight, own_bias)
    torch.testing.assert_close(linear.onto(base, x).double(), base + product, atol=2e-5, rtol=0)
    torch.testing.assert_close(linear.gelu(x).double(), F.gelu(product), atol=2e-5, rtol=0)
    assert torch.equal(base, kept)


@pytest.mark.parametrize("kind", [PlainLinear, pytest.param(PackedLinear, marks=needs_float32)])
def test_gradients_pass_through_what_is_done_behind_a_product(kind: type[PlainLinear]) -> None:
    x, weight, bias = products((4, 5))
    for base_too, x_too in (True, True), (True, False), (False, True):
        leaves = [torch.randn(4, 5, 112).requires_grad_(base_too), x.clone().requires_grad_(x_too)]
        true = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
        linear = kind(weight, bias)
        (linear.onto(*leaves) + linear.gelu(leaves[1])).square().sum().backward()
        product = F.linear(true[1], weight.double(), bias.double())
        (true[0] + product + F.gelu(product)).square().sum().backward()
        for result, truth in zip(leaves, true, strict=True):
            if result.requires_grad:
                torch.testing.assert_close(result.grad.double(), truth.grad, atol=5e-3, rtol=1e-4)
            assert (result.grad is None) is (truth.grad is None)


@needs_float32
def test_rows_that_do_not_lie_in_one_piece() -> None:
    wide, weight, bias = torch.randn(5, 20, 100), *products((1,))[1:]
    for x in (wide[..., 7:55], wide[:, 3:9, :48], wide[:1, :1, :48].expand(4, 6, 48), wide[..., :48].transpose(0, 1)):
        torch.testing.assert_close(PackedLinear(weight, bias)(x), F.linear(x, weight, bias), atol=2e-5, rtol=0)


@needs_float32
def test_the_gradient_is_the_plain_ones_and_packs_at_the_first_backward_only() -> None:
    x, weight, bias = products((4, 50))
    packed, result, truth = PackedLinear(weight, bias), x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.inference_mode():
        packed(x)
    assert packed._transposed is None
    (packed(result) ** 2).sum().backward()
    (F.linear(truth, weight.double(), bias.double()) ** 2).sum().backward()
    assert truth.grad is not None
    torch.testing.assert_close(result.grad.double(), truth.grad, atol=1e-6 * truth.grad.abs().max().item(), rtol=0)
    kept = packed._transposed
    assert kept is not None
    packed(result).sum().backward()  # a gradient that is one number spread out
    assert packed._transposed is kept


@needs_float32
def test_what_needs_no_gradient_carries_no_graph() -> None:
    x, weight, bias = products((3,))
    assert not PackedLinear(weight, bias)(x).requires_grad


@needs_float32
def test_the_same_rows_give_the_same_bits_also_when_packed_anew() -> None:
    """What a resumed fit in another process relies on."""
    x, weight, bias = products((197,))
    first, gradient = PackedLinear(weight, bias)(x), torch.ones(197, 112)
    for again in (PackedLinear(weight, bias), PackedLinear(weight.clone(), bias)):
        assert torch.equal(again(x), first)
        assert torch.equal(again.backward(gradient), PackedLinear(weight, bias).backward(gradient))


# --- the forward ------------------------------------------------------------------------------------------------------


@needs_float32
@pytest.mark.parametrize("many", [1, attention.MANY], ids=["head by head", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_forward_is_the_literal_one(kind: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MANY", many)  # these pictures have few tokens
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    backbone = a_backbone(torch.float32, True, **KINDS[kind])
    lengths = (3, 0, 5)
    deep, shallow = some_params(backbone, "vpt_deep", lengths), some_params(backbone, "vpt_shallow", (4, 0, 0))
    with torch.inference_mode():
        for method, params, prompt_lengths in (("vpt_deep", deep, lengths), ("vpt_shallow", shallow, (4, 0, 0))):
            result = logits(backbone, images(3), method, params, prompt_lengths)
            truth = getattr(reference, method)(
                backbone, images(3), params, *((prompt_lengths,) if method == "vpt_deep" else ())
            )
            torch.testing.assert_close(result, truth, atol=2e-5 * truth.abs().max().item(), rtol=0)


def logits(backbone: Backbone, pixels: Tensor, method: str, params: Params, lengths: Sequence[int]) -> Tensor:
    cast = {name: value.to(backbone.dtype) for name, value in params.items()}
    lens = Registry().get(method).lower(backbone, cast, tuple(lengths))
    features = vit.forward(backbone, vit.embed(backbone, pixels.to(backbone.dtype)), condition(lens, len(pixels)))
    return vit.head(features, lens.head_weight, lens.head_bias).float()


def mixed_gradients(backbone: Backbone) -> dict[str, Tensor]:
    """Of one loss over two lanes of one forward: deep prompts with dropout per row, and carried ones."""
    result: dict[str, Tensor] = {}
    lanes = []
    x = vit.embed(backbone, images(5).to(backbone.dtype))
    for method, lengths, rows in (("vpt_deep", (3, 0, 5), x[:3]), ("vpt_shallow", (4, 0, 0), x[3:])):
        prompts = some_params(backbone, method, lengths)["prompts"].requires_grad_()
        keep = torch.rand(len(rows), *prompts.shape, generator=torch.Generator().manual_seed(5)) > 0.2
        params = {**some_params(backbone, method, lengths), "prompts": prompts * keep}
        lens = Registry().get(method).lower(backbone, {k: v.to(backbone.dtype) for k, v in params.items()}, lengths)
        lanes.append(vit.Lane.of(rows, condition(lens, len(rows))))
        result[method] = prompts
    features = torch.cat(vit.forward_lanes(backbone, lanes)).float()
    (features**2).sum().backward()
    return {name: prompts.grad for name, prompts in result.items()}


@needs_float32
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_mixed_lanes_are_the_plain_ones(kind: str) -> None:
    plain, packed = (a_backbone(torch.float32, packing, **KINDS[kind]) for packing in (False, True))
    truth = mixed_gradients(plain)
    for name, result in mixed_gradients(packed).items():
        assert truth[name].abs().max() > 0
        torch.testing.assert_close(result, truth[name], atol=1e-5 * truth[name].abs().max().item(), rtol=0)
    assert all(parameter.grad is None for parameter in packed.model.parameters())


@needs_float32
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_models_own_weights_answers_and_gradients_have_the_same_bits(kind: str) -> None:
    backbone = a_backbone(torch.float32, True, **KINDS[kind])
    lengths = (3, 0, 5)
    params = some_params(backbone, "vpt_deep", lengths)
    biases = some_params(backbone, "bias", (0, 0, 0))  # what it adds is a product without a bias
    with torch.inference_mode():
        before = [
            logits(backbone, images(3), *first)
            for first in (("vpt_deep", params, lengths), ("bias", biases, (0, 0, 0)))
        ]
    gradients = mixed_gradients(a_backbone(torch.float32, True, **KINDS[kind]))
    held = sum(parameter.numel() for parameter in backbone.model.parameters())
    backbone.free_unpacked_weights()
    assert sum(parameter.numel() for parameter in backbone.model.parameters()) < held / 3
    with torch.inference_mode():
        after = [
            logits(backbone, images(3), *first)
            for first in (("vpt_deep", params, lengths), ("bias", biases, (0, 0, 0)))
        ]
    assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))
    for name, gradient in mixed_gradients(backbone).items():
        assert torch.equal(gradient, gradients[name])
    with pytest.raises(RuntimeError):
        backbone.model(images(1))


def test_weights_that_are_not_packed_stay() -> None:
    backbone = a_backbone(torch.float32, packed=False)
    backbone.free_unpacked_weights()
    assert backbone.model(images(1)).shape == (1, 64)


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def similarity(result: Tensor, truth: Tensor) -> float:
    return F.cosine_similarity(result.flatten().double(), truth.flatten().double(), dim=0).item()


@needs_bfloat16
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_answers_and_gradients_are_close_and_gradients_reach_float32_parameters(kind: str) -> None:
    wide, narrow = a_backbone(torch.float32, False, **KINDS[kind]), a_backbone(torch.bfloat16, True, **KINDS[kind])
    assert narrow.packed
    params = some_params(wide, "vpt_deep", (3, 0, 5))
    with torch.inference_mode():
        result, truth = (logits(backbone, images(8), "vpt_deep", params, (3, 0, 5)) for backbone in (narrow, wide))
    assert similarity(result, truth) > 0.999
    gradients = mixed_gradients(wide)
    for name, gradient in mixed_gradients(narrow).items():
        assert gradient.dtype == torch.float32
        assert similarity(gradient, gradients[name]) > 0.99


@needs_bfloat16
def test_bfloat16_agrees_on_real_pictures(shared: Path) -> None:
    """DeiT-Tiny with its own ImageNet head on photographs: what half of the bits cost."""
    file = shared / "weights" / "deit_tiny_patch16_224.fp16.safetensors"
    state = load_file(file)
    wide, narrow = (
        backbones.load("deit_tiny_patch16_224", file, device="cpu", dtype=d) for d in ("float32", "bfloat16")
    )
    pixels = photographs(sorted((shared / "datasets" / "trashnet").rglob("*.jpg"))[::40][:24])
    with torch.inference_mode():
        result, truth = (
            vit.head(
                vit.forward(backbone, vit.embed(backbone, pixels.to(backbone.dtype)), Plain()).float(), *head(state)
            )
            for backbone in (narrow, wide)
        )
    assert (result - truth).abs().max() < 0.05 * (truth.max() - truth.min())
    assert (result.argmax(1) == truth.argmax(1)).float().mean() >= 0.85
    assert not torch.equal(result, truth)


def head(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return state["head.weight"].float(), state["head.bias"].float()


def photographs(files: Sequence[Path]) -> Tensor:
    assert files
    stack = np.stack([np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(stack) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


# --- threads ----------------------------------------------------------------------------------------------------------

COUNT = """
import os, torch, timm
torch.set_num_threads(1)
from server.engine import backbone as backbones, vit
from server.engine.lens import Plain
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
for dtype in ("float32", "bfloat16"):
    backbone = backbones.load("untrained", device="cpu", dtype=dtype)
    x = vit.embed(backbone, torch.randn(16, 3, 96, 96, dtype=backbone.dtype)).requires_grad_()
    vit.forward(backbone, x, Plain()).float().sum().backward()
    print(dtype, backbone.packed, threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in Linux's /proc")
def test_the_products_start_no_threads_of_their_own() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=root, env={"PATH": "", "OMP_NUM_THREADS": "8"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    counted = [line.split() for line in done.stdout.splitlines()]
    assert [(dtype, started) for dtype, _, started in counted] == [("float32", "0"), ("bfloat16", "0")]


# --- the bench --------------------------------------------------------------------------------------------------------


def test_the_bench_prints_and_saves_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        size = "--arch vit_tiny_patch16_224 --rounds 1 --tasks 2 --train-batch 1 --residents 8"
        bench.main([*size.split(), "--json", str(tmp_path / "table.json")])
    finally:
        torch.set_num_threads(threads)
    (report,) = json.loads((tmp_path / "table.json").read_text())["archs"]
    images = capsys.readouterr().out
    groups = [times for times in report.values() if isinstance(times, dict)]
    assert len(groups) == 5
    for name in (name for times in groups for name in times):
        assert name in images
    assert all(ms > 0 for times in groups for ms in times.values())


# --- memory -----------------------------------------------------------------------------------------------------------

SHAPES = """
import ctypes, sys
if sys.argv[1] == "server":
    import server.__main__
import torch
from server.engine.packed import PackedLinear
linear = PackedLinear(torch.randn(32, 32), None)
def held_mib(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def multiply(shapes):
    with torch.inference_mode():
        for rows in shapes:
            linear(torch.zeros(rows, 32))
multiply(range(1, 300))
before = held_mib()
multiply(range(300, 900))
print(held_mib() - before)
"""


@needs_float32
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="asks Linux's /proc")
def test_rows_of_ever_other_numbers_take_no_more_memory() -> None:
    """Lanes of carried tokens make ever new shapes, and oneDNN keeps the code that it has made for each."""

    def grown(how: str) -> float:
        plain = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
        command = [sys.executable, "-c", SHAPES, how]
        done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=300, check=True)
        return float(done.stdout)

    assert grown("plain") > 150, "nothing to bound: the test shows nothing"
    assert grown("server") < 50
