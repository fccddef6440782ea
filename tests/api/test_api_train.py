"""Jobs over a real socket and the real SQLite job store; the test plays the worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lensrack import wire
from server.jobs.job import Job
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_api_datasets import ZIP, zipped
from tests.serving.floor import bundle


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        yield api


@pytest.fixture
def dataset(api: Api) -> str:
    return str(api.http.post("/datasets", content=zipped(), headers=ZIP).json()["id"])


@pytest.fixture(scope="module")
def one_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, str]]:
    """For the cases of tests that need no server of their own, with a data set."""
    with serving(tmp_path_factory.mktemp("home")) as api:
        yield api, str(api.http.post("/datasets", content=zipped(), headers=ZIP).json()["id"])


def train(api: Api, dataset: str, task: str = "pets", key: str | None = None, **more: Any) -> httpx.Response:
    headers = {"idempotency-key": key} if key is not None else {}
    return api.http.post("/train", json={"task": task, "dataset": dataset, **more}, headers=headers)


def claim(api: Api) -> Job:
    job = api.services.jobs.claim("worker", 30)
    assert job is not None
    return job


def test_a_job_is_accepted_and_can_be_watched(api: Api, dataset: str):
    answer = train(api, dataset, method="vpt_deep", recipe={"epochs": 3, "lr": 0.1})
    assert answer.status_code == 202, answer.text
    job = wire.Job.model_validate(answer.json())
    assert answer.headers["location"] == f"/train/{job.id}"
    assert (job.state, job.task, job.dataset, job.method) == ("queued", "pets", dataset, "vpt_deep")
    assert job.recipe == {"epochs": 3, "lr": 0.1}, "what was left out is the method's to choose"
    assert wire.Job.model_validate(api.http.get(answer.headers["location"]).json()) == job


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, ("auto", {"search": "auto"})),
        ({"recipe": "auto"}, ("auto", {"search": "auto"})),
        ({"recipe": "quick"}, ("auto", {"search": "quick"})),
        ({"recipe": {"epochs": 3}}, ("auto", {"search": "auto", "epochs": 3})),
        ({"recipe": {"search": "none"}}, ("auto", {"search": "none"})),
        ({"method": "linear"}, ("linear", {"search": "auto"})),
        ({"method": "linear", "recipe": {}}, ("linear", {})),
        ({"method": "linear", "recipe": {"search": "auto", "budget": 9}}, ("linear", {"search": "auto", "budget": 9})),
    ],
)
def test_what_is_not_said_is_searched(
    one_api: tuple[Api, str], asked: dict[str, Any], kept: tuple[str, dict[str, Any]]
) -> None:
    job = train(*one_api, **asked).json()
    assert (job["method"], job["recipe"]) == kept


def test_a_short_dataset_id_is_stored_whole(api: Api, dataset: str):
    assert train(api, dataset[:10]).json()["dataset"] == dataset


@pytest.mark.parametrize(
    ("body", "refusal", "says"),
    [
        ({"dataset": "0" * 64}, (404, "dataset_not_found"), "0"),
        ({"method": "magic"}, (422, "unknown_method"), "auto, linear, vpt_deep"),
        ({"task": "BAD"}, (422, "invalid_request"), "task"),
        ({"recipe": {"epochs": 0}}, (422, "invalid_request"), "recipe.epochs"),
        ({"recipe": {"learning_rate": 1}}, (422, "invalid_request"), "recipe.learning_rate"),
        ({"recipe": "thorough"}, (422, "invalid_request"), "recipe"),
        ({"recipe": {"search": "thorough"}}, (422, "invalid_request"), "recipe.search"),
        ({"recipe": {"augment": "rotate"}}, (422, "invalid_request"), "recipe.augment"),
        ({"publish": "sometimes"}, (422, "invalid_request"), "publish"),
        ({"priority": 101}, (422, "invalid_request"), "priority"),
        ({"priority": 0.5}, (422, "invalid_request"), "priority"),
        ({"surprise": 1}, (422, "invalid_request"), "surprise"),
    ],
)
def test_refusals(one_api: tuple[Api, str], body: dict[str, Any], refusal: tuple[int, str], says: str):
    api, dataset = one_api
    before = api.http.get("/train").json()["jobs"]
    answer = api.http.post("/train", json={"task": "pets", "dataset": dataset, **body})
    assert says in assert_problem(answer, *refusal)["detail"]
    assert api.http.get("/train").json()["jobs"] == before


def test_policy_and_priority_are_kept_with_the_job(api: Api, dataset: str):
    plain = wire.Job.model_validate(train(api, dataset).json())
    assert (plain.publish, plain.priority) == ("always", 0)
    urgent = wire.Job.model_validate(train(api, dataset, publish="if_better", priority=7).json())
    assert (urgent.publish, urgent.priority) == ("if_better", 7)
    late = wire.Job.model_validate(train(api, dataset, publish="never", priority=-100).json())
    assert [claim(api).id for _ in range(3)] == [urgent.id, plain.id, late.id]
    assert wire.Job.model_validate(api.http.get(f"/train/{urgent.id}").json()).publish == "if_better"


def test_an_idempotency_key_makes_one_job(api: Api, dataset: str):
    first, again = train(api, dataset, key="k1"), train(api, dataset, key="k1")
    assert first.json()["id"] == again.json()["id"]
    assert again.status_code == 202
    problem = assert_problem(train(api, dataset, task="others", key="k1"), 409, "idempotency_conflict")
    assert problem["job"] == first.json()["id"]
    assert_problem(train(api, dataset, key="k1", publish="never"), 409, "idempotency_conflict")
    assert train(api, dataset, key="k2").json()["id"] != first.json()["id"]
    assert_problem(train(api, dataset, key="x" * 256), 422, "invalid_request")


def test_pages_and_filters(api: Api, dataset: str):
    made = [train(api, dataset, task=task).json()["id"] for task in ("a", "b", "a", "b", "a")]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = wire.JobList.model_validate(api.http.get("/train", params={"limit": 2, **cursor}).json())
        assert len(page.jobs) <= 2
        seen += [job.id for job in page.jobs]
        if page.next is None:
            break
        cursor = {"cursor": page.next}
    assert seen == made[::-1]
    assert len(api.http.get("/train?task=a").json()["jobs"]) == 3
    api.http.post(f"/train/{made[0]}/cancel")
    assert [job["id"] for job in api.http.get("/train?state=cancelled").json()["jobs"]] == [made[0]]
    assert_problem(api.http.get("/train?state=sleeping"), 422, "invalid_request")
    assert_problem(api.http.get("/train?limit=0"), 422, "invalid_request")
    assert_problem(api.http.get("/train?cursor=nonsense"), 400, "bad_request")


def test_cancelling(api: Api, dataset: str):
    waiting, running = train(api, dataset).json()["id"], train(api, dataset, task="b").json()["id"]
    assert api.http.post(f"/train/{waiting}/cancel").json()["state"] == "cancelled"
    assert_problem(api.http.post(f"/train/{waiting}/cancel"), 409, "job_finished")
    assert claim(api).id == running
    asked = api.http.post(f"/train/{running}/cancel").json()
    assert (asked["state"], asked["cancel_requested"]) == ("running", True)


@pytest.mark.parametrize("path", ["", "/events"])
def test_unknown_jobs(api: Api, path: str):
    for unknown in ("nobody", "job_" + "0" * 26):
        assert_problem(api.http.get(f"/train/{unknown}{path}"), 404, "job_not_found")


# --- events -----------------------------------------------------------------------------------------------------------


def events(api: Api, job: str, **query: Any) -> wire.JobEvents:
    answer = api.http.get(f"/train/{job}/events", params=query)
    assert answer.status_code == 200, answer.text
    return wire.JobEvents.model_validate(answer.json())


def test_events_come_once_each_and_end(api: Api, dataset: str):
    train(api, dataset)
    job = claim(api)
    api.services.jobs.append_event(job.id, job.attempt, "epoch", {"epoch": 1, "loss": float("nan")})
    first = events(api, job.id)
    assert [(one.seq, one.type) for one in first.events] == [(1, "queued"), (2, "started"), (3, "epoch")]
    assert first.events[2].data == {"epoch": 1, "loss": None}
    assert (first.next, first.finished) == (3, False)
    empty = events(api, job.id, after=first.next)
    assert (empty.events, empty.next, empty.finished) == ([], 3, False)
    api.services.jobs.finish(job.id, job.attempt, "failed", error={"code": "boom", "detail": "it broke"})
    last = events(api, job.id, after=3)
    assert [one.type for one in last.events] == ["failed"]
    assert last.finished
    told = wire.Job.model_validate(api.http.get(f"/train/{job.id}").json())
    assert (told.finished, told.error.code, told.error.detail) == (True, "boom", "it broke")


def test_a_long_poll_wakes_for_a_new_event(api: Api, dataset: str):
    train(api, dataset)
    job = claim(api)
    appended: list[float] = []

    def later() -> None:
        time.sleep(0.5)
        api.services.jobs.append_event(job.id, job.attempt, "epoch", {"epoch": 1})
        appended.append(time.monotonic())

    worker = threading.Thread(target=later)
    worker.start()
    found = events(api, job.id, after=2, wait_s=20)
    woke = time.monotonic()
    worker.join()
    assert [one.type for one in found.events] == ["epoch"]
    assert woke - appended[0] < 2, "the wait is far shorter than what was asked for"


def test_a_long_poll_without_news_ends_in_time_and_one_on_a_finished_job_at_once(api: Api, dataset: str):
    job = train(api, dataset).json()["id"]
    started = time.monotonic()
    assert events(api, job, after=1, wait_s=0.4).events == []
    assert 0.4 <= time.monotonic() - started < 5
    api.http.post(f"/train/{job}/cancel")
    started = time.monotonic()
    assert events(api, job, after=2, wait_s=30).finished
    assert time.monotonic() - started < 5
    assert_problem(api.http.get(f"/train/{job}/events?wait_s=31"), 422, "invalid_request")


def test_success_is_told_only_when_the_version_can_be_asked(api: Api, dataset: str):
    """A worker in another process has published: whoever reads `succeeded` must find the version here."""
    train(api, dataset, method="linear")
    job = claim(api)
    refreshed: list[str] = []
    api.floor.store.refresh = refreshed.append
    version = api.floor.store.put(bundle("pets"))
    api.services.jobs.finish(job.id, job.attempt, "succeeded", version=version, metrics={"accuracy": 0.9})
    told = wire.Job.model_validate(api.http.get(f"/train/{job.id}").json())
    assert (told.state, told.version, told.metrics) == ("succeeded", version, {"accuracy": 0.9})
    assert refreshed == ["pets"]
    assert events(api, job.id).finished
    assert refreshed == ["pets", "pets"]


# --- baselines and comparisons ----------------------------------------------------------------------------------------


def compare(api: Api, dataset: str, **more: Any) -> httpx.Response:
    return api.http.post("/compare", json={"task": "pets", "dataset": dataset, **more})


@pytest.mark.parametrize("publish", [{}, {"publish": "always"}, {"publish": "if_better"}])
def test_a_baseline_that_is_to_be_served_is_refused_with_the_reason(api: Api, dataset: str, publish: dict[str, str]):
    problem = assert_problem(train(api, dataset, method="full", **publish), 422, "method_not_servable")
    assert "changes every weight of the backbone" in problem["detail"]
    assert "'never'" in problem["detail"]


def test_a_baseline_is_taken_for_its_figures(api: Api, dataset: str):
    job = train(api, dataset, method="full", publish="never", recipe={"epochs": 2}).json()
    assert (job["method"], job["publish"], job["recipe"]) == ("full", "never", {"epochs": 2, "search": "none"})
    assert_problem(train(api, dataset, method="full", publish="never", recipe="quick"), 422, "invalid_request")
    listed = api.http.get("/methods").json()
    assert [one["name"] for one in listed["baselines"]] == ["full"]
    assert "full" not in [one["name"] for one in listed["methods"]]


def test_a_comparison_is_a_job_with_a_table(api: Api, dataset: str):
    answer = compare(api, dataset, methods=["linear", "full"], seeds=[3, 4], recipe={"epochs": 2})
    assert answer.status_code == 202, answer.text
    job = wire.Job.model_validate(answer.json())
    assert answer.headers["location"] == f"/train/{job.id}"
    assert (job.method, job.publish) == ("compare", "never")
    assert job.recipe == {"compare": {"methods": ["linear", "full"], "seeds": [3, 4], "recipe": {"epochs": 2}}}
    waiting = wire.Comparison.model_validate(api.http.get(f"/compare/{job.id}").json())
    assert (waiting.state, waiting.rows, waiting.dataset) == ("queued", [], dataset)
    row = {"method": "linear", "fits": 2, "test_accuracy": 0.5, "parameters": 7, "fit_s": 1.0}
    claimed = claim(api)
    found = {"dataset_split": "test", "rows": [row], "fits": []}
    api.services.jobs.finish(job.id, claimed.attempt, "succeeded", metrics={"compare": found})
    done = wire.Comparison.model_validate(api.http.get(f"/compare/{job.id}").json())
    assert (done.id, done.state, done.dataset_split) == (job.id, "succeeded", "test")
    assert (done.rows[0].method, done.rows[0].test_accuracy) == ("linear", 0.5)


def test_a_comparison_is_of_all_that_can_be_served_if_nothing_is_said(api: Api, dataset: str):
    asked = compare(api, dataset).json()["recipe"]["compare"]
    assert asked == {"methods": ["linear", "vpt_deep"], "seeds": [0, 1, 2], "recipe": {}}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"methods": ["linear", "vpt_deeper"]}, "unknown_method"),
        ({"methods": []}, "invalid_request"),
        ({"methods": ["linear", "linear"]}, "invalid_request"),
        ({"seeds": [1, 1]}, "invalid_request"),
        ({"seeds": []}, "invalid_request"),
        ({"recipe": {"lr": 0.1}}, "invalid_request"),
    ],
)
def test_a_wrong_comparison_is_refused(one_api: tuple[Api, str], more: dict[str, Any], code: str):
    assert_problem(compare(*one_api, **more), 422, code)


def test_what_compares_nothing_has_no_table(api: Api, dataset: str):
    job = train(api, dataset, method="linear").json()
    assert_problem(api.http.get(f"/compare/{job['id']}"), 404, "job_not_found")
    assert_problem(api.http.get("/compare/job_x"), 404, "job_not_found")
