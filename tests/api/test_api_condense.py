"""A job that begins with a version: what it takes over from it, and what is refused before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from prompts_store import Backbone as BackboneOf
from prompts_store import Bundle
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_api_datasets import ZIP, zipped
from tests.serving.floor import MANIFEST, bundle


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        yield api


@pytest.fixture
def dataset(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = api.http.post("/datasets", content=zipped(), headers=ZIP).json()
    return found


def prompted(labels: list[str], **changes: Any) -> Bundle:
    """By vpt_deep, with prompts in each layer."""
    width = 4
    manifest = replace(MANIFEST, task="pets", method="vpt_deep", labels=tuple(labels), **changes)
    manifest = replace(manifest, prompt_lengths=(2,) * len(manifest.prompt_lengths))
    tensors = {
        "prompts": np.ones((sum(manifest.prompt_lengths), width), np.float32),
        "head.weight": np.zeros((len(labels), width), np.float32),
        "head.bias": np.zeros(len(labels), np.float32),
    }
    return Bundle.build(manifest, tensors)


def condense(api: Api, version: str = "live", recipe: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
    how = {"version": version, **more.pop("how", {})}
    return api.http.post("/train", json={"task": "pets", "recipe": {"condense": how, **(recipe or {})}, **more})


@pytest.mark.parametrize("name", ["live", "version", "beginning"])
def test_method_data_set_and_recipe_are_the_versions(api: Api, dataset: dict[str, Any], name: str) -> None:
    own = {"epochs": 8, "lr": 0.01, "preset": "gone", "init": "tokens", "condense": {"epsilon": 0.5}, "another": 1}
    version = api.services.store.put(prompted(dataset["labels"], dataset=dataset["id"], recipe=own))
    api.services.store.set_alias("pets", "live", version)
    named = {"live": "live", "version": version, "beginning": version[:12]}[name]
    answer = condense(api, named, {"lr": 0.5}, how={"keep": [0.1]})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["method"], job["dataset"]) == ("vpt_deep", dataset["id"])
    assert job["recipe"] == {"epochs": 8, "lr": 0.5, "condense": {"keep": [0.1], "version": version}}


def test_of_a_split_alias_the_heavier_version(api: Api, dataset: dict[str, Any]) -> None:
    one, other = (
        api.services.store.put(prompted(dataset["labels"], dataset=dataset["id"], created_at=at)) for at in (1.0, 2.0)
    )
    api.services.store.set_alias("pets", "live", {one: 0.3, other: 0.7})
    assert condense(api).json()["recipe"]["condense"]["version"] == other


def test_a_step_after_a_fit_needs_no_version(api: Api, dataset: dict[str, Any]) -> None:
    asked = {"task": "pets", "dataset": dataset["id"], "method": "vpt_deep"}
    job = api.http.post("/train", json={**asked, "recipe": {"condense": True}}).json()
    assert job["recipe"] == {"condense": {}}
    job = api.http.post("/train", json={**asked, "recipe": {"condense": False}}).json()
    assert job["recipe"] == {}


def refused(api: Api, answer: httpx.Response, status: int, code: str, about: str) -> None:
    assert_problem(answer, status, code)
    assert about in answer.json()["detail"]
    assert api.http.get("/train").json()["jobs"] == [], "nothing is queued"


def test_what_is_not_there(api: Api, dataset: dict[str, Any]) -> None:
    refused(api, condense(api), 404, "task_not_found", "pets")
    api.services.store.put(prompted(dataset["labels"], dataset=dataset["id"]))
    refused(api, condense(api, "best"), 404, "version_not_found", "best")
    refused(api, condense(api, "f" * 64), 404, "version_not_found", "f" * 12)
    version = api.services.store.put(prompted(dataset["labels"], dataset="e" * 64))
    refused(api, condense(api, version), 404, "dataset_not_found", "e" * 12)


def test_what_does_not_go_together(api: Api, dataset: dict[str, Any]) -> None:
    put, labels, known = api.services.store.put, dataset["labels"], {"dataset": dataset["id"]}
    version = put(prompted(labels, **known))
    refused(api, condense(api, version, method="linear"), 422, "invalid_request", "expected vpt_deep")
    refused(api, condense(api, version, {"search": "auto"}), 422, "invalid_request", "expected no search")
    refused(api, condense(api, version, {"init": "tokens"}), 422, "invalid_request", "expected no init")
    refused(api, condense(api, put(bundle("pets", labels=labels))), 422, "invalid_request", "with prompts")
    refused(api, condense(api, put(prompted([*labels, "unicorn"], **known))), 422, "invalid_request", "unicorn")
    refused(api, condense(api, put(prompted(labels))), 409, "no_parent_dataset", "expected a dataset")
    strange = put(prompted(labels, **known, recipe={"epochs": "many"}))
    refused(api, condense(api, strange), 422, "invalid_request", "epochs")
    other = BackboneOf(arch="other", fingerprint="a" * 64)
    refused(api, condense(api, put(prompted(labels, **known, backbone=other))), 409, "wrong_backbone", "a" * 12)


def test_a_job_without_a_data_set_is_refused(api: Api) -> None:
    answer = api.http.post("/train", json={"task": "pets", "recipe": {"condense": True}})
    refused(api, answer, 422, "invalid_request", "expected a dataset")
