"""Loading the one frozen ViT: which ones are let in, what the fingerprint sees, how a wrong file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from server.engine import backbone as backbones
from server.engine import vit
from server.engine.backbone import Backbone, BackboneError
from server.engine.lens import Plain

SMALL = {"img_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 4}
PLAIN = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "vit_tiny_patch16_224 with mean pooling": {"global_pool": "avg", "class_token": False, "fc_norm": True},
    "vit_tiny_patch16_224 with registers": {"reg_tokens": 4, "no_embed_class": True},
    "vit_tiny_patch16_224 with layer scale and qk-norm": {"init_values": 0.1, "qk_norm": True},
    "vit_tiny_patch16_224 with pre-norm": {"pre_norm": True},
    "vit_tiny_patch16_224 without qkv bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_forward_without_prompts_is_timms(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name.split(" ", maxsplit=1)[0], num_classes=0, **SMALL, **PLAIN[name]).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    wrapped = Backbone.of(name, model, dtype=torch.float64)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        ours = vit.forward(wrapped, vit.embed(wrapped, images), Plain())
        torch.testing.assert_close(ours, model(images), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {}, "VisionTransformer"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "blocks.0: expected Block, got ParallelScalingBlock"),
        ("eva02_tiny_patch14_224", {}, "VisionTransformer"),
    ],
)
def test_others_are_refused_with_the_reason(name: str, options: dict[str, int], reason: str) -> None:
    model = timm.create_model(name, num_classes=0, **options)
    with pytest.raises(BackboneError, match=reason):
        Backbone.of(name, model)


def test_the_stand_in_is_the_same_everywhere_and_says_that_it_is_untrained() -> None:
    spec = backbones.load("untrained").spec
    assert not spec.trained
    assert spec.fingerprint == "c4147fcb94568cf44f1f7d65a8d57133f88ad1a46b927cd40b2d55976c48dd0b"
    assert (spec.depth, spec.dim, spec.image_size, spec.tokens) == (6, 192, 96, 65)


def test_the_fingerprint_sees_every_weight_and_the_name() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    state = model.state_dict()
    before = backbones.fingerprint("a", state)
    assert backbones.fingerprint("a", model.state_dict()) == before
    assert backbones.fingerprint("b", state) != before
    state["norm.bias"][7] += 1e-6
    assert backbones.fingerprint("a", state) != before


def test_the_fingerprint_does_not_depend_on_the_working_precision() -> None:
    assert (
        backbones.load("untrained", dtype="bfloat16").spec.fingerprint == backbones.load("untrained").spec.fingerprint
    )


def test_weights_from_a_file_with_a_classifier_that_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("deit_tiny_patch16_224", num_classes=10).state_dict()
    save_file({key: tensor.half() for key, tensor in state.items()}, tmp_path / "w.safetensors")
    wrapped = backbones.load("deit_tiny_patch16_224", tmp_path / "w.safetensors")
    torch.testing.assert_close(wrapped.model.state_dict()["norm.weight"], state["norm.weight"])
    assert wrapped.spec.trained
    assert wrapped.spec.preprocess.crop_pct == 0.9


def _broken(tmp_path: Path, change: str) -> Path:
    state = timm.create_model("deit_tiny_patch16_224", num_classes=0).state_dict()
    if change == "missing":
        del state["norm.bias"]
    if change == "unknown":
        state["nrom.bias"] = torch.zeros(1)
    if change == "shape":
        state["norm.bias"] = torch.zeros(3)
    if change == "NaN":
        state["norm.bias"][0] = torch.nan
    file = tmp_path / "w.safetensors"
    save_file(state, file)
    if change == "cannot be read":
        file.write_bytes(file.read_bytes()[:1000])
    return file


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "NaN", "cannot be read"])
def test_a_wrong_file_is_refused(tmp_path: Path, change: str) -> None:
    file = _broken(tmp_path, change)
    with pytest.raises(BackboneError, match=r"norm.bias|nrom.bias" if change != "cannot be read" else change):
        backbones.load("deit_tiny_patch16_224", file)


@pytest.mark.parametrize("name", ["no_such_vit", "", "../etc"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(BackboneError, match="unknown backbone"):
        backbones.load(name)
