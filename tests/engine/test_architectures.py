"""Every ViT that timm lists is served exactly, or refused with the reason; and `docs/backbones.md` says which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from typer.testing import CliRunner

from server.__main__ import cli
from server.engine import reference, vit
from server.engine.architectures import Architecture, architectures, family, table
from server.engine.backbone import Backbone
from server.engine.compatibility import incompatibility
from server.engine.lens import Plain
from server.methods.method import Params
from server.methods.registry import Registry
from tests.engine.golden_cases import Bench

DOC = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"
EXAMPLES = re.findall(r"^\| [^|]+ \| +\d+ \| `(\w+)` ", DOC.read_text(), re.MULTILINE)
# What no first of a family has: gated MLPs, RMS norms with qk-norm, registers before attention pooling.
MORE = ["vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2", "test_vit4", "vit_so150m_patch16_reg4_map_256"]
NARROW = {"embed_dim": 96, "num_heads": 4}
WHOLE = {"vit_base_mci_224"}  # its stem is as wide as the backbone
LENGTHS = (3, 2)
METHODS = tuple(Registry().meanings)


def small(arch: str) -> VisionTransformer:
    """Two narrow blocks of this architecture, every weight drawn at random, in float64."""
    torch.manual_seed(0)
    size = {"img_size": 3 * int(result[1]) if (result := re.search(r"patch(\d+)", arch)) else 96}
    model = timm.create_model(arch, num_classes=0, depth=2, **size, **({} if arch in WHOLE else NARROW)).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def drawn(backbone: Backbone, method: str, seed: int) -> tuple[Params, tuple[int, ...]]:
    chosen = Registry().get(method)
    possible = chosen.prompt_lengths(backbone.spec, 1)
    lengths = tuple(length * some for length, some in zip(LENGTHS, possible, strict=True))
    generator = torch.Generator().manual_seed(seed)
    shapes = chosen.shapes(backbone.spec, lengths, 5)
    return {name: 0.2 * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}, lengths


@pytest.mark.parametrize("arch", [*EXAMPLES, *MORE])
def test_one_of_each_family_is_timms_own_and_all_methods_in_one_batch_are_literal(arch: str) -> None:
    model = small(arch)
    backbone = Backbone.of(arch, model, dtype=torch.float64)
    images = torch.randn(2, 3, backbone.spec.image_size, backbone.spec.image_size, dtype=torch.float64)
    tasks = [(method, *drawn(backbone, method, seed)) for seed, method in enumerate(METHODS)]
    bench = Bench(backbone)
    with torch.inference_mode():
        x = vit.embed(backbone, images)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        close(vit.forward(backbone, x, Plain()), expected)
        seats = [bench.seat(Registry().get(method).lower(backbone, *drawn_params)) for method, *drawn_params in tasks]
        rows = [(picture, seat) for picture in range(2) for seat in seats]
        answers = torch.stack(bench.engine.logits(x, rows)).unflatten(0, (2, -1))
        for result, (method, params, lengths) in zip(answers.unbind(1), tasks, strict=True):
            close(result, reference.logits(method, backbone, images, params, lengths), method)


def close(result: Tensor, expected: Tensor, what: str = "plain") -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(result, expected, atol=1e-9 * scale, rtol=0, msg=lambda text: f"{what}: {text}")
    assert expected.std() > 1e-3


@pytest.mark.parametrize(
    ("arch", "options", "reason"),
    [
        ("vit_base_patch16_224", {"global_pool": "avgmax"}, "global_pool: expected token or avg or map, got 'avgmax'"),
        ("vit_base_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix: expected"),
        ("vit_base_patch16_224", {"global_pool": "prr"}, "global_pool"),
        ("vit_base_patch16_224", {"img_size": (32, 64)}, "patch_embed.img_size: expected a square, got 32×64"),
        ("vit_base_patch16_224", {"scale_attn_norm": True}, "blocks.0.attn.norm: expected Identity, got LayerNorm"),
        ("vit_base_patch16_xp_224", {}, "blocks.0: expected Block, got ParallelScalingBlock"),
        ("vit_relpos_base_patch16_224", {}, "got VisionTransformerRelPos"),
        ("samvit_base_patch16", {}, "got VisionTransformerSAM"),
    ],
)
def test_what_is_refused_is_named_with_what_was_expected(arch: str, options: dict[str, object], reason: str) -> None:

    with torch.device("meta"):
        result = incompatibility(timm.create_model(arch, num_classes=0, depth=1, **options))
    assert result is not None
    assert reason in result


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch14_reg4_dinov2", "vit reg dinov2"),
        ("vit_tiny_r_s16_p8_224", "vit hybrid"),
        ("vit_so400m_patch14_siglip_gap_224", "vit siglip gap"),
        ("deit_tiny_distilled_patch16_224", "deit distilled"),
    ],
)
def test_a_name_tells_its_family(name: str, expected: str) -> None:
    assert family(name) == expected


def test_the_table_counts_what_it_is_given() -> None:
    result = [Architecture("vit_a", "vit", None), Architecture("vit_b", "vit", "why"), Architecture("x", "x", "why")]
    assert table(result).splitlines()[2:] == ["| vit | 1 | `vit_a` | 1 | `why` |", "| x | 0 |  | 1 | `why` |"]


def test_the_page_says_what_the_command_prints() -> None:
    """The command looks at all of timm's architectures anew."""
    page = DOC.read_text()
    written = re.search(r"timm (\d+(?:\.\w+)*)", page)
    assert written is not None
    if written[1] != timm.__version__:
        pytest.skip(f"docs/backbones.md was written with timm {written[1]}, this is {timm.__version__}")
    done = CliRunner().invoke(cli, ["backbones"])
    assert done.exit_code == 0
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert done.stdout.splitlines()[: len(rows)] == rows


def test_no_family_is_left_out() -> None:
    """Cheap, and on any version of timm: plain names are served, under whatever name they come."""
    served = {member.name for member in architectures(("vit_tiny_*", "deit_*")) if member.incompatibility is None}
    assert {"vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"} <= served
