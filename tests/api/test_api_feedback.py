"""Feedback over a real socket: said, listed, withdrawn, and frozen into a dataset that can be trained on."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from lensrack import Client, wire
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_api_datasets import FILES, ZIP, zipped
from tests.serving.floor import png, publish

PNG = {"content-type": "image/png"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        yield api


@pytest.fixture
def dataset(api: Api) -> str:
    """Cats and dogs, on which the live version of task pets was fitted."""
    stored = api.http.post("/datasets?name=pets", content=zipped(), headers=ZIP).json()["id"]
    publish(api.floor.store, "pets", labels=("cat", "dog"), dataset=stored)
    return stored


def say(api: Api, data: bytes, label: str, **params: str) -> httpx.Response:
    return api.http.post("/tasks/pets/feedback", params={"label": label, **params}, content=data, headers=PNG)


def listed(api: Api, **params: str) -> wire.FeedbackPage:
    return wire.FeedbackPage.model_validate(api.http.get("/tasks/pets/feedback", params=params).json())


@pytest.mark.usefixtures("dataset")
def test_the_last_word_about_a_picture_counts(api: Api) -> None:
    first = say(api, png(200), "cat")
    told = wire.Feedback.model_validate(first.json())
    assert (first.status_code, told.task, len(told.items)) == (201, "pets", 1)
    assert (told.items[0].sha256, told.items[0].previous) == (hashlib.sha256(png(200)).hexdigest(), None)
    assert say(api, png(200), "cat").status_code == 200
    second = say(api, png(200), "dog")
    assert (second.status_code, second.json()["items"][0]["previous"]) == (201, "cat")
    page = listed(api)
    assert (page.images, page.labels, [item.label for item in page.items]) == (1, {"dog": 1}, ["dog"])


@pytest.mark.usefixtures("dataset")
def test_the_forms_that_predict_takes(api: Api) -> None:
    files = [("images", (f"{n}.png", png(n), "image/png")) for n in (201, 202)]
    form = api.http.post("/tasks/pets/feedback?label=cat", files=files)
    assert (form.status_code, len(form.json()["items"])) == (201, 2)
    body = {"images": [{"b64": base64.b64encode(png(203)).decode()}]}
    assert api.http.post("/tasks/pets/feedback?label=dog", json=body).status_code == 201
    assert listed(api).labels == {"cat": 2, "dog": 1}
    assert len(listed(api, limit="2").items) == 2
    following = listed(api, limit="2", cursor=listed(api, limit="2").next or "")
    assert ([item.label for item in following.items], following.next) == (["cat"], None)
    assert [item.label for item in listed(api, label="dog").items] == ["dog"]


@pytest.mark.usefixtures("dataset")
def test_withdrawing(api: Api) -> None:
    sha256 = say(api, png(200), "cat").json()["items"][0]["sha256"]
    assert api.http.delete(f"/tasks/pets/feedback/{sha256}").status_code == 204
    assert_problem(api.http.delete(f"/tasks/pets/feedback/{sha256}"), 404, "feedback_not_found")
    assert listed(api).images == 0
    assert_problem(api.http.post("/tasks/pets/feedback/dataset"), 409, "no_feedback")


@pytest.mark.usefixtures("dataset")
def test_refusals(api: Api) -> None:
    unknown = assert_problem(say(api, png(200), "owl"), 422, "unknown_label")
    assert "expected one of cat, dog" in unknown["detail"]
    assert unknown["nearest"] is None
    typo = assert_problem(say(api, png(200), "Catt"), 422, "unknown_label")
    assert (typo["nearest"], typo["detail"].rpartition("; ")[2]) == ("cat", "did you mean 'cat'?")
    assert_problem(say(api, png(200), " \n"), 422, "invalid_request")
    assert_problem(say(api, png(200), "x" * 201, new_label="true"), 422, "invalid_request")
    assert_problem(say(api, b"no picture", "cat"), 415, "unsupported_image")
    assert_problem(say(api, png(200)[:-20], "cat"), 400, "bad_image")
    assert_problem(say(api, b"", "cat"), 400, "bad_image")
    assert_problem(api.http.post("/tasks/pets/feedback", content=png(), headers=PNG), 422, "invalid_request")
    plain = api.http.post("/tasks/pets/feedback?label=cat", content=b"x", headers={"content-type": "text/plain"})
    assert_problem(plain, 415, "unsupported_media_type")
    assert_problem(api.http.get("/tasks/pets/feedback?cursor=x"), 422, "invalid_request")
    for path in ("feedback?label=cat", "feedback/dataset"):
        assert_problem(api.http.post(f"/tasks/nobody/{path}", content=png(), headers=PNG), 404, "task_not_found")
    assert_problem(api.http.get("/tasks/nobody/feedback"), 404, "task_not_found")
    assert_problem(api.http.get("/tasks/No!/feedback"), 400, "bad_task_name")
    assert listed(api).images == 0


LABELS = ("می\u200cخواهم", "red  car", "red car", "c ", "Ka\u0308fer", "so\u00adft")


def test_the_very_label_that_was_predicted_is_taken(api: Api) -> None:
    publish(api.floor.store, "pets", labels=LABELS)
    [scored] = api.http.post(f"/predict/pets?top_k={len(LABELS)}", content=png(9), headers=PNG).json()["predictions"]
    assert {one["label"] for one in scored} == {*LABELS}
    for number, one in enumerate(scored):
        told = say(api, png(number), one["label"])
        assert (told.status_code, told.json()["items"][0]["label"]) == (201, one["label"])
    for written, meant in {"K\u00e4fer": "Ka\u0308fer", "c": "c ", "soft": "so\u00adft"}.items():
        assert say(api, png(50), written).json()["items"][0]["label"] == meant
        assert say(api, png(51), written, new_label="true").json()["items"][0]["label"] == written
    assert_problem(say(api, png(52), "red   car"), 422, "unknown_label")


def test_frozen_it_corrects_and_extends_what_the_live_version_was_fitted_on(api: Api, dataset: str) -> None:
    say(api, FILES["train/cat/0.png"], "dog")
    say(api, png(200), "cat")
    say(api, png(201), "dog")
    say(api, png(202), "owl", new_label="true")
    first = api.http.post("/tasks/pets/feedback/dataset?name=better")
    told = wire.Dataset.model_validate(first.json())
    assert (first.status_code, first.headers["location"]) == (201, f"/datasets/{told.id}")
    assert (told.parent, told.name, told.labels) == (dataset, "better", ["cat", "dog"])
    assert told.splits == {"train": {"cat": 3, "dog": 5}}
    assert [file.name.partition("/")[0] for file in told.skipped] == ["owl"]
    assert told.skipped[0].reason == "the new class 'owl' has 1 picture in train; expected at least 2"
    say(api, png(203), "owl", new_label="true")
    second = wire.Dataset.model_validate(api.http.post("/tasks/pets/feedback/dataset").json())
    assert second.splits == {"train": {"cat": 3, "dog": 5, "owl": 2}}
    assert api.http.post("/tasks/pets/feedback/dataset").json()["id"] == second.id
    job = api.http.post("/train", json={"task": "pets", "dataset": second.id, "method": "linear"})
    assert (job.status_code, job.json()["dataset"]) == (202, second.id)


def test_a_lone_picture_of_a_new_class_is_told_at_once_and_whenever_it_is_left_out(api: Api, dataset: str) -> None:
    """It vanished: "1 correction", and then the old dataset as if it were a new one."""
    so_far = "the new class 'owl' has 1 picture so far; it is left out of training until it has 2"
    first = wire.Feedback.model_validate(say(api, png(202), "owl", new_label="true").json())
    assert [(one.code, one.text) for one in first.warnings] == [("rare_label", so_far)]
    assert listed(api).warnings == first.warnings
    nothing = assert_problem(api.http.post("/tasks/pets/feedback/dataset"), 409, "nothing_new")
    assert nothing["skipped"][0]["name"].startswith("owl/feedback/")
    assert "the new class 'owl' has 1 picture in train; expected at least 2" in nothing["detail"]
    say(api, png(203), "cat")
    without_owl = api.http.post("/tasks/pets/feedback/dataset").json()
    api.http.delete(f"/tasks/pets/feedback/{first.items[0].sha256}")
    again = api.http.post("/tasks/pets/feedback/dataset").json()
    assert (again["id"], again["skipped"]) == (without_owl["id"], []), "what is left out is this request's"
    assert [file["name"][:4] for file in without_owl["skipped"]] == ["owl/"]
    say(api, png(202), "owl", new_label="true")
    assert wire.Feedback.model_validate(say(api, png(204), "owl", new_label="true").json()).warnings == []
    assert listed(api).warnings == []
    assert api.http.get(f"/datasets/{dataset}").json()["skipped"] == []


def test_the_next_round_starts_from_the_frozen_one(api: Api, dataset: str) -> None:
    say(api, png(200), "cat")
    first = api.http.post("/tasks/pets/feedback/dataset").json()["id"]
    publish(api.floor.store, "pets", seed=1, labels=("cat", "dog"), dataset=first)
    nothing = assert_problem(api.http.post("/tasks/pets/feedback/dataset"), 409, "nothing_new")
    assert (nothing["parent"], nothing["skipped"]) == (first, [])
    say(api, png(201), "cat")
    assert api.http.post("/tasks/pets/feedback/dataset").json()["parent"] == first
    assert api.http.post(f"/tasks/pets/feedback/dataset?parent={dataset}").json()["images"] == len(FILES) + 2


def test_without_the_live_version_s_dataset_another_is_named(api: Api, dataset: str) -> None:
    say(api, png(200), "cat")
    other = api.http.post("/datasets", content=zipped({**FILES, "train/cat/9.png": png(250)}), headers=ZIP).json()["id"]
    api.http.delete(f"/datasets/{dataset}")
    assert_problem(api.http.post("/tasks/pets/feedback/dataset"), 409, "no_parent_dataset")
    assert_problem(api.http.post("/tasks/pets/feedback/dataset?parent=ffffffff"), 404, "dataset_not_found")
    assert api.http.post(f"/tasks/pets/feedback/dataset?parent={other}").json()["images"] == len(FILES) + 2
    publish(api.floor.store, "pets", seed=3, labels=("cat", "dog"))
    assert_problem(api.http.post("/tasks/pets/feedback/dataset"), 409, "no_parent_dataset")


def test_a_frozen_dataset_outlives_the_feedback_and_the_task(api: Api, dataset: str) -> None:
    say(api, png(200), "cat")
    frozen = api.http.post("/tasks/pets/feedback/dataset").json()
    assert api.http.delete("/tasks/pets").status_code == 204
    publish(api.floor.store, "pets", labels=("cat", "dog"), dataset=dataset)
    assert listed(api).images == 0
    assert api.http.delete(f"/datasets/{dataset}").status_code == 204
    assert api.http.get(f"/datasets/{frozen['id']}").json() == frozen
    sha256 = hashlib.sha256(png(200)).hexdigest()
    assert api.services.datasets.read(sha256) == png(200)


@pytest.mark.usefixtures("dataset")
def test_many_at_once(api: Api) -> None:
    with ThreadPoolExecutor(8) as pool, Client(api.url) as client:
        list(pool.map(lambda n: client.feedback("pets", png(n), "cat" if n % 2 else "dog"), [*range(100, 130)] * 2))
    assert listed(api).labels == {"cat": 15, "dog": 15}
