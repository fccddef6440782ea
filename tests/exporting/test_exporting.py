"""What is exported gives what the engine gives: as an ONNX file in ONNX's own runtime, as a timm model in timm."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

from prompts_store import Backbone as Named
from prompts_store import Bundle, Manifest, Preprocess
from server.engine import reference
from server.engine.backbone import Backbone
from server.engine.batch import normalise
from server.errors import Unprocessable
from server.exporting.to_onnx import Input, to_onnx
from server.exporting.to_timm import LEARNED, to_timm
from server.methods.registry import METHODS, Registry

pytestmark = pytest.mark.slow

CONFIG = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CLASSES, LABELS = 3, ("ant", "bee", "wasp")
TOLERANCE = 1e-4
HOW = Preprocess(32, (0.48, 0.46, 0.41), (0.23, 0.22, 0.21), "bicubic", 1.0, "center")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(3)
    model = VisionTransformer(**CONFIG, num_classes=0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Backbone.of("vit_tiny_test", model, packed=False)


def bundle(backbone: Backbone, name: str) -> Bundle:
    """Every parameter drawn at random, so that no part of a method stays without effect."""
    method = Registry().get(name)
    lengths = method.prompt_lengths(backbone.spec, 4)
    lengths = (lengths[0], max(0, lengths[1] - 1)) if lengths[1] else lengths  # ragged where there are any
    draw = np.random.default_rng(7)
    params = {
        parameter: draw.normal(0, 0.3, shape).astype(np.float32)
        for parameter, shape in method.shapes(backbone.spec, lengths, CLASSES).items()
    }
    named = Named(backbone.spec.arch, backbone.spec.fingerprint)
    manifest = Manifest("bugs", name, named, LABELS, lengths, HOW, {}, {}, None, None, 1.0, "0.1.0")
    return Bundle.build(manifest, params)


def pictures(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 256, (rows, 32, 32, 3), np.uint8)


def truth(backbone: Backbone, task_bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    """The literal forward, one task at a time."""
    params = {name: torch.tensor(array) for name, array in task_bundle.tensors.items()}
    normal = normalised(pixels)
    with torch.inference_mode():
        expected = reference.logits(
            task_bundle.manifest.method, backbone, normal, params, task_bundle.manifest.prompt_lengths
        )
    return expected.numpy()


def normalised(pixels: np.ndarray) -> torch.Tensor:
    return normalise(torch.tensor(pixels), torch.tensor([HOW.mean]), torch.tensor([HOW.std]), torch.float32)


@pytest.mark.parametrize("name", [method.name for method in METHODS])
def test_onnx_gives_what_the_engine_gives(backbone: Backbone, name: str) -> None:
    """Batches of other sizes than the one that was traced, one picture among them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    task_bundle = bundle(backbone, name)
    session = onnxruntime.InferenceSession(
        to_onnx(task_bundle, backbone, Registry()), providers=["CPUExecutionProvider"]
    )
    for rows in (1, 5):
        [logits] = session.run(None, {"pixels": pictures(rows)})
        np.testing.assert_allclose(logits, truth(backbone, task_bundle, pictures(rows)), atol=TOLERANCE, rtol=0)
    entries = session.get_modelmeta().custom_metadata_map
    assert json.loads(entries["labels"]) == list(LABELS)
    assert json.loads(entries["preprocess"])["mean"] == list(HOW.mean)
    assert entries["version"] == task_bundle.version


def test_onnx_of_normalised_floats(backbone: Backbone) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    task_bundle = bundle(backbone, "vpt_deep")
    model = to_onnx(task_bundle, backbone, Registry(), Input.FLOAT)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"pixels": normalised(pictures(3)).numpy()})
    np.testing.assert_allclose(logits, truth(backbone, task_bundle, pictures(3)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["linear", "bias", "lora"])
def test_what_can_be_merged_is_a_plain_timm_model(backbone: Backbone, name: str) -> None:
    task_bundle = bundle(backbone, name)
    model = VisionTransformer(**CONFIG, num_classes=CLASSES).eval()
    model.load_state_dict(load(to_timm(task_bundle, backbone)), strict=True)
    with torch.inference_mode():
        logits = model(normalised(pictures(4)))
    np.testing.assert_allclose(logits.numpy(), truth(backbone, task_bundle, pictures(4)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["vpt_deep", "vpt_shallow", "prompt_bias"])
def test_prompts_beside_a_timm_model(backbone: Backbone, name: str) -> None:
    """With the lines of docs/howto-import.md, which put them in."""
    task_bundle = bundle(backbone, name)
    state = load(to_timm(task_bundle, backbone))
    prompts = {int(key.split(".")[1]): state.pop(key) for key in list(state) if key.startswith("prompts.")}
    model = VisionTransformer(**CONFIG, num_classes=CLASSES).eval()
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        x = model.norm_pre(model._pos_embed(model.patch_embed(normalised(pictures(4)))))
        image = x.shape[1]
        for layer, block in enumerate(model.blocks):
            if layer == 0 or name != "vpt_shallow":
                x = x[:, :image]
            if layer in prompts:
                x = torch.cat((x, prompts[layer].expand(len(x), -1, -1)), dim=1)
            x = block(x)
        logits = model.forward_head(model.norm(x[:, :image]))
    np.testing.assert_allclose(logits.numpy(), truth(backbone, task_bundle, pictures(4)), atol=TOLERANCE, rtol=0)


def test_what_timm_has_no_place_for_is_refused(backbone: Backbone) -> None:
    for name in {method.name for method in METHODS} - set(LEARNED):
        with pytest.raises(Unprocessable, match=f"method {name} does not fit into a timm model") as refusal:
            to_timm(bundle(backbone, name), backbone)
        assert refusal.value.code == "not_exportable"


def test_the_file_says_what_it_is(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("timm") / "bugs.safetensors"
    file.write_bytes(to_timm(bundle(backbone, "linear"), backbone))
    with safe_open(file, "pt") as opened:
        entries = opened.metadata()
    assert (entries["architecture"], entries["task"], json.loads(entries["labels"])) == (
        "vit_tiny_test",
        "bugs",
        list(LABELS),
    )
