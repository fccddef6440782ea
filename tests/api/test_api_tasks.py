"""Tasks, versions, aliases and residency over a real socket and the real memory store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lensrack import wire
from prompts_store import Backbone, Bundle
from server.api import follow_ups
from server.errors import DiskFull, Unavailable
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_admission import until
from tests.serving.floor import bundle, png, publish

BUNDLE = {"content-type": "application/octet-stream"}
PNG = {"content-type": "image/png"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        yield api


def upload(api: Api, new: Bundle, task: str = "fish", query: str = "") -> httpx.Response:
    return api.http.put(f"/tasks/{task}/versions{query}", content=new.data, headers=BUNDLE)


def move(api: Api, version: str, alias: str = "live", weight: float = 1.0, **headers: str) -> httpx.Response:
    body = {"version": version, "weight": weight}
    return api.http.put(
        f"/tasks/fish/aliases/{alias}", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def shares(answer: httpx.Response) -> dict[str, float]:
    assert answer.status_code == 200, answer.text
    return {target["version"]: pytest.approx(target["weight"]) for target in answer.json()["targets"]}


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_bundle_goes_up_and_comes_down_unchanged(api: Api):
    new = bundle()
    answer = upload(api, new)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/tasks/fish/versions/{new.version}"
    told = wire.VersionInfo.model_validate(answer.json())
    assert (told.version, told.method, told.labels, told.bytes) == (
        new.version,
        "linear",
        ["a", "b", "c"],
        len(new.data),
    )
    assert told.preprocess["interpolation"] == "bicubic"
    down = api.http.get(f"{answer.headers['location']}/bundle")
    assert down.content == new.data
    assert down.headers["etag"] == f'"{new.version}"'
    assert api.http.get(f"/tasks/fish/versions/{new.version[:8]}").json()["version"] == new.version


def test_an_upload_moves_no_alias_unless_asked(api: Api):
    new = bundle()
    upload(api, new)
    assert api.http.get("/tasks/fish").json()["live"] is None
    assert_problem(
        api.http.post("/predict/fish", content=png(), headers={"content-type": "image/png"}), 404, "alias_not_found"
    )
    assert upload(api, new, query="?alias=live").status_code == 201
    assert api.http.get("/tasks/fish").json()["live"] == new.version
    assert_problem(upload(api, new, query="?alias=NOT"), 422, "invalid_request")


def test_bundles_that_are_refused(api: Api):
    problem = assert_problem(upload(api, bundle(backbone=Backbone("vit", "0" * 64))), 409, "wrong_backbone")
    assert "0" * 64 in problem["detail"]
    assert "f" * 64 in problem["detail"]
    problem = assert_problem(upload(api, bundle("cat"), task="fish"), 400, "bad_bundle")
    assert "'fish'" in problem["detail"]
    assert "'cat'" in problem["detail"]
    for data in (b"", b"nonsense", bundle().data[:-1], bundle().data + b"x"):
        answer = api.http.put("/tasks/fish/versions", content=data, headers=BUNDLE)
        assert_problem(answer, 400, "bad_bundle")
    plain = api.http.put("/tasks/fish/versions", content=bundle().data, headers={"content-type": "text/plain"})
    assert_problem(plain, 415, "unsupported_media_type")
    assert api.http.get("/tasks").json() == {"tasks": []}


def test_listing_and_deleting_versions(api: Api):
    old, new = bundle(seed=1, created_at=1.0), bundle(seed=2, created_at=2.0)
    for each in (old, new):
        upload(api, each)
    move(api, new.version)
    listed = [info["version"] for info in api.http.get("/tasks/fish/versions").json()["versions"]]
    assert listed == [new.version, old.version]
    assert_problem(api.http.delete(f"/tasks/fish/versions/{new.version}"), 409, "version_in_use")
    api.http.post(f"/tasks/fish@{old.version}/load")
    assert api.floor.shelf.resident("fish", old.version)
    assert api.http.delete(f"/tasks/fish/versions/{old.version}").status_code == 204
    assert not api.floor.shelf.resident("fish", old.version), "deleted on the device too"
    assert_problem(api.http.get(f"/tasks/fish/versions/{old.version}"), 404, "version_not_found")
    assert_problem(api.http.get("/tasks/fish/versions/zz"), 404, "version_not_found")
    assert_problem(api.http.get(f"/tasks/fish/versions/{old.version}/bundle"), 404, "version_not_found")


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_tasks(api: Api):
    fish, bird = publish(api.floor.store, "fish"), publish(api.floor.store, "bird")
    api.http.post("/tasks/bird/load")
    listed = wire.TaskList.model_validate(api.http.get("/tasks").json()).tasks
    assert [(task.task, task.live, task.versions, task.resident) for task in listed] == [
        ("bird", bird, 1, True),
        ("fish", fish, 1, False),
    ]
    assert [alias.name for alias in listed[0].aliases] == ["live"]
    assert api.http.delete("/tasks/bird").status_code == 204
    assert not api.floor.shelf.resident("bird", bird)
    assert_problem(api.http.get("/tasks/bird"), 404, "task_not_found")
    assert_problem(api.http.delete("/tasks/bird"), 404, "task_not_found")


def test_a_deletion_is_told_as_done_though_what_follows_it_fails(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has deleted the task, so a refusal would not be true; its feedback follows behind the answer."""
    monkeypatch.setattr(follow_ups, "RETRY_S", (0.01,))
    publish(api.floor.store, "fish")
    path = "/tasks/fish/feedback"
    assert api.http.post(f"{path}?label=a", content=png(1), headers=PNG).status_code == 201
    delete, failures = api.services.feedback.delete_task, iter([DiskFull("no room"), Unavailable("no answer")])

    def fails_at_first(task: str) -> None:
        for failure in failures:
            raise failure
        delete(task)

    monkeypatch.setattr(api.services.feedback, "delete_task", fails_at_first)
    assert api.http.delete("/tasks/fish").status_code == 204
    assert_problem(api.http.get("/tasks/fish"), 404, "task_not_found")
    publish(api.floor.store, "fish")
    until(lambda: api.http.get(path).json()["images"] == 0)


@pytest.mark.parametrize(
    "path", ["/tasks/BAD", "/tasks/BAD/versions", "/tasks/-a/aliases/live", "/tasks/a%20b/versions"]
)
def test_bad_task_names(api: Api, path: str):
    assert "[a-z0-9]" in assert_problem(api.http.get(path), 400, "bad_task_name")["detail"]


# --- aliases ----------------------------------------------------------------------------------------------------------


def test_moving_an_alias_with_if_match(api: Api):
    one, two = (api.floor.store.put(bundle(seed=seed)) for seed in (1, 2))
    first = move(api, one)
    assert first.status_code == 200
    etag = first.headers["etag"]
    assert api.http.get("/tasks/fish/aliases/live").headers["etag"] == etag
    second = move(api, two[:10], if_match=etag)
    assert shares(second) == {two: 1}
    stale = move(api, one, if_match=etag)
    problem = assert_problem(stale, 412, "precondition_failed")
    assert problem["current"]["targets"] == [{"version": two, "weight": 1.0}]
    assert f'"{problem["current"]["revision"]}"' == second.headers["etag"]
    assert_problem(move(api, one, if_match='"abc"'), 412, "precondition_failed")
    assert_problem(move(api, one, if_none_match="*"), 412, "precondition_failed")
    assert shares(move(api, one, alias="new", if_none_match="*")) == {one: 1}
    absent = assert_problem(move(api, one, alias="other", if_match='"1"'), 412, "precondition_failed")
    assert absent["current"] is None


def test_alias_refusals(api: Api):
    version = publish(api.floor.store)
    assert_problem(move(api, "0" * 64), 404, "version_not_found")
    assert_problem(move(api, "short"), 404, "version_not_found")
    assert_problem(move(api, version, alias="BAD"), 422, "bad_alias")
    assert_problem(move(api, version, weight=0), 422, "invalid_request")
    assert_problem(move(api, version, weight=1.5), 422, "invalid_request")
    assert_problem(api.http.get("/tasks/fish/aliases/nobody"), 404, "alias_not_found")
    assert_problem(api.http.get("/tasks/fish/aliases/nobody/history"), 404, "alias_not_found")
    assert_problem(api.http.put("/tasks/nobody/aliases/live", json={"version": version}), 404, "task_not_found")
    assert_problem(api.http.put("/tasks/fish/aliases/live", json={}), 422, "invalid_request")


def test_a_canary_takes_its_share_and_leaves_the_rest_as_it_was(api: Api):
    one, two, three = (api.floor.store.put(bundle(seed=seed)) for seed in (1, 2, 3))
    move(api, one)
    assert shares(move(api, two, weight=0.25)) == {one: 0.75, two: 0.25}
    assert shares(move(api, three, weight=0.5)) == {one: 0.375, two: 0.125, three: 0.5}
    assert shares(move(api, two, weight=0.5)) == {one: 0.5 * 0.375 / 0.875, three: 0.5 * 0.5 / 0.875, two: 0.5}
    assert shares(move(api, two)) == {two: 1}
    problem = assert_problem(move(api, two, weight=0.5), 422, "invalid_request")
    assert "no other version" in problem["detail"]
    assert_problem(move(api, two, weight=0.5, alias="fresh"), 404, "alias_not_found")


def test_canaries_set_at_once_do_not_lose_each_other(api: Api):
    """Two writers without If-Match: each blend is of what is there, so both canaries stay."""
    one, two, three = (api.floor.store.put(bundle(seed=seed)) for seed in (1, 2, 3))
    move(api, one)
    start = threading.Barrier(2)

    def canary(version: str) -> None:
        start.wait()
        with httpx.Client(base_url=api.url, timeout=20) as client:
            client.put("/tasks/fish/aliases/live", json={"version": version, "weight": 0.5}).raise_for_status()

    threads = [threading.Thread(target=canary, args=(version,)) for version in (two, three)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = shares(api.http.get("/tasks/fish/aliases/live"))
    assert set(left) == {one, two, three}
    assert left[one] == 0.25


def test_history_and_rollback(api: Api):
    one, two = (api.floor.store.put(bundle(seed=seed)) for seed in (1, 2))
    move(api, one)
    assert_problem(api.http.post("/tasks/fish/rollback"), 409, "no_history")
    moved = move(api, two)
    assert shares(api.http.post("/tasks/fish/rollback")) == {one: 1}
    changes = wire.AliasHistory.model_validate(api.http.get("/tasks/fish/aliases/live/history").json()).changes
    assert [change.targets[0].version for change in changes] == [one, two, one]
    assert [change.revision for change in changes] == sorted(change.revision for change in changes)
    assert shares(api.http.post("/tasks/fish/rollback", json={"alias": "live"})) == {two: 1}
    stale = api.http.post("/tasks/fish/rollback", headers={"if-match": moved.headers["etag"]})
    assert_problem(stale, 412, "precondition_failed")
    assert_problem(api.http.post("/tasks/fish/rollback", json={"alias": "nobody"}), 404, "alias_not_found")


def test_deleting_an_alias(api: Api):
    version = publish(api.floor.store)
    assert_problem(
        api.http.delete("/tasks/fish/aliases/live", headers={"if-match": '"99"'}), 412, "precondition_failed"
    )
    assert api.http.delete("/tasks/fish/aliases/live").status_code == 204
    assert_problem(api.http.get("/tasks/fish/aliases/live"), 404, "alias_not_found")
    assert api.http.delete(f"/tasks/fish/versions/{version}").status_code == 204


# --- residency --------------------------------------------------------------------------------------------------------


def test_residency_is_told_truthfully(api: Api):
    version = publish(api.floor.store)

    def told(verb: str, **body: bool) -> wire.Residency:
        answer = api.http.post(f"/tasks/fish/{verb}", json=body) if body else api.http.post(f"/tasks/fish/{verb}")
        assert answer.status_code == 200, answer.text
        return wire.Residency.model_validate(answer.json())

    loaded = told("load")
    assert (loaded.version, loaded.resident, loaded.pinned, loaded.bytes) == (version, True, False, 1024)
    assert told("pin").pinned
    assert not told("pin", pinned=False).pinned
    freed = told("unload")
    assert (freed.resident, freed.bytes) == (False, 0)
    pinned = told("pin")
    assert (pinned.resident, pinned.pinned) == (True, True), "pinning makes it resident"
    assert api.floor.shelf.in_use == 0
    assert api.http.get("/tasks/fish").json()["resident"] is True
    assert api.http.get(f"/tasks/fish/versions/{version}").json()["resident"] is True


def test_residency_of_what_does_not_exist(api: Api):
    publish(api.floor.store)
    for verb in ("load", "unload", "pin"):
        assert_problem(api.http.post(f"/tasks/nobody/{verb}"), 404, "task_not_found")
        assert_problem(api.http.post(f"/tasks/fish@gone/{verb}"), 404, "alias_not_found")
        assert_problem(api.http.post(f"/tasks/NO/{verb}"), 400, "bad_task_name")
    assert_problem(api.http.post(f"/tasks/fish@{'0' * 64}/load"), 404, "version_not_found")
