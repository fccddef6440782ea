"""A stranger's checkpoint through both command lines and HTTP into a running server, and out of it as ONNX."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from server.engine import reference
from server.engine.backbone import UNTRAINED, Backbone, load
from server.engine.batch import normalise
from tests.e2e.forked_server import forked
from tests.e2e.server_process import ROOT, ServerProcess, environment

LABELS = ("auk", "corn  bunting ", "co\u200cot")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN_CUT = {"crop_pct": 1.0, "crop_mode": "squash"}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load(UNTRAINED, device="cpu", dtype="float32", packed=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with forked(tmp_path_factory.mktemp("import")) as running:
        yield running


def checkpoint(folder: Path, backbone: Backbone, seed: int) -> tuple[list[Path], dict[str, torch.Tensor]]:
    """As the official script and a person with a head to save write them."""
    draw = torch.Generator().manual_seed(seed)
    dim, depth = backbone.spec.dim, backbone.spec.depth
    prompts = torch.randn(depth, 2, dim, generator=draw)
    head = {"weight": torch.randn(3, dim, generator=draw), "bias": torch.randn(3, generator=draw)}
    files = [folder / "prompt_ep100.pth", folder / "head.pth"]
    torch.save({"shallow_prompt": prompts[:1].numpy(), "deep_prompt": prompts[1:].numpy()}, files[0])
    torch.save({f"head.last_layer.{leaf}": own for leaf, own in head.items()}, files[1])
    params = {"prompts": prompts.reshape(-1, dim), **{f"head.{leaf}": own for leaf, own in head.items()}}
    return files, params


def run(server: ServerProcess, *command: str) -> str:
    """A command with the server's environment; what it says."""
    done = subprocess.run(
        [sys.executable, "-c" if " " in command[0] else "-m", *command],
        env={**environment(server.home, {}), "LENSRACK_URL": server.url},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def picture(backbone: Backbone, seed: int) -> np.ndarray:
    size = backbone.spec.image_size
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def literal(backbone: Backbone, pixels: np.ndarray, params: dict[str, torch.Tensor]) -> np.ndarray:
    normal = normalise(torch.tensor(pixels[None]), torch.tensor([MEAN]), torch.tensor([STD]), torch.float32)
    with torch.inference_mode():
        return reference.logits("vpt_deep", backbone, normal, params, (2,) * backbone.spec.depth)[0].numpy()


def scores(server: ServerProcess, task: str, pixels: np.ndarray) -> list[float]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    answer = httpx.post(
        f"{server.url}/predict/{task}?top_k=3",
        content=file.getvalue(),
        headers={"content-type": "image/png"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    found = {told["label"]: told["score"] for told in answer.json()["predictions"][0]}
    return [found[label] for label in LABELS]


def assert_served(server: ServerProcess, task: str, backbone: Backbone, params: dict[str, torch.Tensor]) -> None:
    pixels = picture(backbone, 5)
    logits = literal(backbone, pixels, params).astype(np.float64)
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(scores(server, task, pixels), expected / expected.sum(), atol=1e-4)


@pytest.mark.slow
def test_in_by_every_way_and_out_as_onnx(server: ServerProcess, backbone: Backbone, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS), encoding="utf-8-sig")  # as Windows writes it
    cut = json.dumps(PLAIN_CUT)

    files, params = checkpoint(tmp_path, backbone, 1)
    given = [*map(str, files), "--labels", str(labels), "--preprocess", cut, "--alias", "live"]
    version = run(server, "server", "import", "birds", *given)
    assert_served(server, "birds", backbone, params)

    program = "import sys; from lensrack.cli import main; main()"
    by_http = run(server, program, "import", "birds", *given)
    assert by_http == version, "the same files are the same version, whichever way they came"

    files, params = checkpoint(tmp_path, backbone, 2)
    form = [("file", (file.name, file.read_bytes())) for file in files]
    words = {"labels": json.dumps(LABELS), "preprocess": cut}
    put = httpx.put(f"{server.url}/tasks/waders/versions?alias=live", files=form, data=words, timeout=60)
    assert put.status_code == 201, put.text
    assert put.json()["recipe"]["backbone"] == "assumed"
    assert_served(server, "waders", backbone, params)

    onnxruntime = pytest.importorskip("onnxruntime")
    file, ref = tmp_path / "waders.onnx", f"waders@{put.json()['version'][:10]}"
    run(server, "server", "export", ref, "--format", "timm", "-o", str(tmp_path / "waders.safetensors"))
    assert "prompts.0" in load_file(tmp_path / "waders.safetensors")
    run(server, program, "export", ref, "--format", "onnx", "-o", str(file))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"pixels": picture(backbone, 9)[None]})
    np.testing.assert_allclose(logits[0], literal(backbone, picture(backbone, 9), params), atol=1e-4)
