"""What a newcomer finds: a server that sees, offline, and has two tasks to ask."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from lensrack import Client
from prompts_store import Bundle
from server.cli import sample_tasks
from server.engine import backbone as backbones
from server.engine import bundled
from server.settings import Settings
from tests.e2e.forked_server import forked
from tests.e2e.server_process import ROOT

PICTURES = bundled.FOLDER / "pictures"


@pytest.fixture(scope="module")
def backbone() -> backbones.Backbone:
    return backbones.load(bundled.BUNDLED)


def test_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LENSRACK_BACKBONE")
    assert Settings().backbone == bundled.BUNDLED


def test_the_first_question_is_answered_truly(tmp_path: Path) -> None:
    with forked(tmp_path, backbone="bundled") as server, Client(server.url) as client:
        ready = httpx.get(f"{server.url}/readyz").json()
        assert ready["backbone"]["trained"] is True
        assert ready["notes"] == []
        assert [task.task for task in client.tasks.list()] == ["digits", "faces"]
        assert client.predict("digits", PICTURES / "7.png").best.label == "7"
        assert client.predict("faces", PICTURES / "face.png").best.label == "face"
        assert client.predict("faces", PICTURES / "7.png").best.label == "other"


def test_a_deleted_sample_does_not_come_back_beside_others(tmp_path: Path) -> None:
    with forked(tmp_path, backbone="bundled") as server, Client(server.url) as client:
        client.tasks.delete("digits")
    with forked(tmp_path, backbone="bundled") as server, Client(server.url) as client:
        assert [task.task for task in client.tasks.list()] == ["faces"]


@pytest.mark.parametrize("settings", [{"backbone": "bundled", "sample_tasks": "false"}, {"backbone": "untrained"}])
def test_no_samples_where_they_are_not_wanted_or_do_not_fit(tmp_path: Path, settings: dict[str, str]) -> None:
    with forked(tmp_path, **settings) as server, Client(server.url) as client:
        assert list(client.tasks.list()) == []


def test_it_is_small_and_its_card_names_it(backbone: backbones.Backbone) -> None:
    card = (bundled.FOLDER / "MODEL_CARD.md").read_text()
    assert bundled.WEIGHTS.stat().st_size <= 12_000_000
    assert backbone.spec.fingerprint in card
    assert "Apache-2.0" in card
    assert re.search(r"python -m server pretrain .*--teacher", card)


def test_the_samples_were_fitted_on_it(backbone: backbones.Backbone) -> None:
    bundles = [Bundle.parse(file.read_bytes()) for file in (bundled.FOLDER / "tasks").iterdir()]
    assert {bundle.manifest.task for bundle in bundles} == set(sample_tasks.TASKS)
    for bundle in bundles:
        assert bundle.manifest.backbone.fingerprint == backbone.spec.fingerprint
        assert bundle.manifest.metrics["test_accuracy"] > 0.9


@pytest.mark.long
def test_whoever_makes_them_anew_gets_as_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_tasks, "TASKS", {"faces": sample_tasks.TASKS["faces"]})
    found = sample_tasks.make(tmp_path)
    shipped = Bundle.parse((bundled.FOLDER / "tasks" / "faces.safetensors").read_bytes())
    assert found["faces"] == pytest.approx(shipped.manifest.metrics["test_accuracy"], abs=0.05)
    assert (tmp_path / "pictures" / "face.png").read_bytes() == (PICTURES / "face.png").read_bytes()


def test_weights_that_tell_nothing_of_themselves_are_refused(tmp_path: Path) -> None:
    (tmp_path / "backbone.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"the bundled backbone backbone.safetensors cannot be read"):
        bundled.create(tmp_path / "backbone.safetensors")


def test_it_takes_no_other_weights(tmp_path: Path) -> None:
    with pytest.raises(backbones.BackboneError, match="brings its own weights"):
        backbones.load("bundled", tmp_path / "other.safetensors")


def test_the_readme_asks_it_first() -> None:
    assert "server/bundled/pictures/7.png" in (ROOT / "README.md").read_text()
