"""Other people's checkpoints over a real socket: a file as it is, a form with several, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from lensrack import Client
from tests.api.api_server import Api, assert_problem, serving

HEAD = {"head.weight": torch.arange(12.0).reshape(3, 4), "head.bias": torch.ones(3)}
VPT = {"shallow_prompt": np.ones((1, 2, 4), np.float32)}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        yield api


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def put(api: Api, *parts: bytes, **words: Any) -> httpx.Response:
    files = [("file", (f"{number}.pth", part)) for number, part in enumerate(parts)]
    data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in words.items()}
    return api.http.put("/tasks/fish/versions?alias=live", files=files, data=data)


def test_one_file_as_it_is(api: Api):
    answer = api.http.put(
        "/tasks/fish/versions?format=timm", content=saved(HEAD), headers={"content-type": "application/octet-stream"}
    )
    assert answer.status_code == 201, answer.text
    told = answer.json()
    assert (told["method"], told["labels"], told["recipe"]["imported_from"]) == ("linear", ["0", "1", "2"], "timm")
    stored = api.floor.store.get("fish", told["version"])
    np.testing.assert_array_equal(stored.tensors["head.weight"], HEAD["head.weight"].numpy())


def test_a_form_with_several_files(api: Api):
    told = put(api, saved(VPT), saved(HEAD), labels=["a", "b", "c"], preprocess={"crop_mode": "squash"})
    assert told.status_code == 201, told.text
    assert (told.json()["method"], told.json()["labels"]) == ("vpt_deep", ["a", "b", "c"])
    assert told.json()["preprocess"]["crop_mode"] == "squash"
    assert api.http.get("/tasks/fish").json()["live"] == told.json()["version"]


def test_the_sdk_sends_the_same(api: Api, tmp_path: Path):
    for name, value in (("prompts.pth", VPT), ("head.pth", HEAD)):
        (tmp_path / name).write_bytes(saved(value))
    with Client(api.url) as client:
        told = client.tasks.import_checkpoint(
            "fish", tmp_path / "head.pth", tmp_path / "prompts.pth", labels=["a", "b", "c"], alias="live"
        )
        again = client.tasks.import_checkpoint(
            "fish", tmp_path / "prompts.pth", tmp_path / "head.pth", labels=["a", "b", "c"], format="vpt"
        )
    assert told.version == again.version == api.http.get("/tasks/fish").json()["live"]


class Thief:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_what_is_refused(api: Api):
    hostile = pickle.dumps({"head.weight": Thief()}, protocol=2)
    assert "'posix.system'" in assert_problem(put(api, hostile), 422, "bad_checkpoint")["detail"]
    assert_problem(put(api, saved(VPT)), 422, "no_head")
    assert_problem(put(api, saved(HEAD), labels=["a"]), 422, "bad_checkpoint")
    assert_problem(put(api, saved(HEAD), labels={"a": 1}), 422, "invalid_request")
    assert_problem(put(api, saved(HEAD), labels="["), 422, "invalid_request")
    assert_problem(put(api, saved(HEAD), colour="red"), 422, "invalid_request")
    assert_problem(put(api, *[saved(HEAD)] * 9), 400, "bad_request")
    jax = api.http.put(
        "/tasks/fish/versions?format=jax", content=b"", headers={"content-type": "application/octet-stream"}
    )
    assert_problem(jax, 422, "invalid_request")
    assert api.http.get("/tasks").json() == {"tasks": []}
