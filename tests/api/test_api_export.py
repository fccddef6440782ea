"""A version for other tools over HTTP, and the process that makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lensrack import Client, NotFoundError
from prompts_store import Backbone as Named
from prompts_store import Bundle
from server.app import exporter
from server.engine.backbone import UNTRAINED, load
from server.errors import ServiceError
from server.settings import Settings
from tests.api.api_server import Api, assert_problem, serving
from tests.serving.floor import MANIFEST, publish


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        publish(api.floor.store)
        yield api


def test_a_version_as_a_file(api: Api) -> None:
    version = api.floor.store.aliases("fish")["live"].heaviest
    for form, takes, ending in (("onnx", "float", ".onnx"), ("timm", "uint8", "-timm.safetensors")):
        answer = api.http.get(f"/tasks/fish/versions/{version[:8]}/export?format={form}&input={takes}")
        assert (answer.status_code, answer.text) == (200, f"{version} {form} {takes}")
        assert answer.headers["content-disposition"] == f'attachment; filename="fish-{version[:12]}{ending}"'
        assert answer.headers["lensrack-version"] == version
    with Client(api.url) as client:
        assert client.tasks.export("fish", input="uint8") == f"{version} onnx uint8".encode()
        assert client.tasks.export("fish", version, format="bundle") == client.tasks.download("fish", version)
        with pytest.raises(NotFoundError):
            client.tasks.export("fish", "0" * 64)
    assert not list((api.services.settings.datasets_dir / "uploads").iterdir()), "an export stays after its answer"


def test_what_cannot_be_exported(api: Api) -> None:
    where = "/tasks/fish/versions/" + api.floor.store.aliases("fish")["live"].heaviest + "/export"
    assert_problem(api.http.get(f"{where}?format=tflite"), 422, "invalid_request")
    assert_problem(api.http.get(f"{where}?format=timm&input=float"), 422, "not_exportable")
    assert not list((api.services.settings.datasets_dir / "uploads").iterdir())


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    spec = load(UNTRAINED, device="cpu", dtype="float32", packed=False).spec
    draw = np.random.default_rng(5)
    head = {"head.weight": draw.normal(size=(3, spec.dim)), "head.bias": draw.normal(size=3)}
    manifest = replace(
        MANIFEST, method="linear", prompt_lengths=(0,) * spec.depth, backbone=Named(spec.arch, spec.fingerprint),
        labels=("a", "b", "c"), preprocess=spec.preprocess, pool=None,
    )  # fmt: skip
    return Bundle.build(manifest, {name: array.astype(np.float32) for name, array in head.items()})


class TestProcess:
    """With the server's own untrained backbone; the formats themselves are tested in tests/exporting."""

    def test_a_state_dict(self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LENSRACK_BACKBONE", UNTRAINED)
        exporter.export(Settings(home=tmp_path), bundle, "timm", "uint8", tmp_path / "model")
        with safe_open(tmp_path / "model", "np") as file:
            assert json.loads(file.metadata()["labels"]) == ["a", "b", "c"]
            np.testing.assert_array_equal(file.get_tensor("head.bias"), bundle.tensors["head.bias"])

    def test_a_refusal_arrives_as_it_was_raised(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A package that is missing is told with what to install."""
        monkeypatch.setenv("LENSRACK_BACKBONE", UNTRAINED)
        (tmp_path / "onnxscript.py").write_text("raise ImportError('not here')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ServiceError, match=r"pip install 'lensrack\[export\]'") as caught:
            exporter.export(Settings(home=tmp_path), bundle, "onnx", "uint8", tmp_path / "model")
        assert (caught.value.status, caught.value.code) == (501, "not_installed")

    def test_a_process_that_dies_is_an_error(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exporter, "COMMAND", ("sh", "-c", "kill -9 $$"))
        with pytest.raises(ServiceError, match="the export ended with status -9"):
            exporter.export(Settings(home=tmp_path), bundle, "onnx", "uint8", tmp_path / "model")
