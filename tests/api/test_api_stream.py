"""A job's events as a stream, over a real socket; the test plays the worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import sse
from tests.api.api_server import Api, assert_problem, serving
from tests.api.test_api_datasets import ZIP, zipped

SSE = {"accept": "text/event-stream"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path) as api:
        yield api


@pytest.fixture
def job(api: Api) -> str:
    dataset = api.http.post("/datasets", content=zipped(), headers=ZIP).json()["id"]
    answer = api.http.post("/train", json={"task": "pets", "dataset": dataset})
    return str(answer.json()["id"])


def work(api: Api, job: str, pause_s: float = 0.0) -> None:
    claimed = api.services.jobs.claim("worker", 30)
    assert claimed is not None
    for epoch in (1, 2, 3):
        time.sleep(pause_s)
        api.services.jobs.append_event(job, claimed.attempt, "epoch", {"epoch": epoch, "note": "ä\nb"})
    api.services.jobs.finish(job, claimed.attempt, "failed", error={"code": "diverged", "detail": "x"})


def frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """A reader of its own, by the standard's rules: fields until a blank line; comments are told as such."""
    fields: dict[str, Any] = {}
    for line in lines:
        if line.startswith(":"):
            yield {"comment": line}
        elif line == "":
            if fields:
                yield fields
            fields = {}
        else:
            name, _, value = line.partition(": ")
            fields[name] = json.loads(value) if name == "data" else value


def read(api: Api, job: str, **headers: str) -> list[dict[str, Any]]:
    with api.http.stream("GET", f"/train/{job}/events", headers={**SSE, **headers}, timeout=30) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"]
        return list(frames(answer.iter_lines()))


def test_a_stream_tells_everything_as_it_happens_and_ends_with_the_job(api: Api, job: str):
    worker = threading.Thread(target=work, args=(api, job, 0.3))
    worker.start()
    found = read(api, job)
    worker.join()
    assert [frame["event"] for frame in found] == ["queued", "started", "epoch", "epoch", "epoch", "failed"]
    assert [int(frame["id"]) for frame in found] == [1, 2, 3, 4, 5, 6]
    assert found[2]["data"]["note"] == "ä\nb"


def test_progress_is_told_between_the_events_without_a_number(
    api: Api, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "WAIT_S", 0.1)
    claimed = api.services.jobs.claim("worker", 30)
    assert claimed is not None
    with api.http.stream("GET", f"/train/{job}/events", headers=SSE, timeout=30) as answer:
        told = frames(answer.iter_lines())
        assert [next(told)["event"], next(told)["event"]] == ["queued", "started"]
        for share in (0.25, 0.5):
            api.services.jobs.heartbeat(job, claimed.attempt, 30, {"phase": "features", "share": share})
            frame = next(told)
            assert (frame["event"], "id" in frame) == ("progress", False)
            assert (frame["data"]["phase"], frame["data"]["share"]) == ("features", share)
        api.services.jobs.finish(job, claimed.attempt, "cancelled")
        assert (next(told)["event"], list(told)) == ("cancelled", [])


def test_whoever_comes_back_misses_nothing_and_hears_nothing_twice(api: Api, job: str):
    work(api, job)
    assert [frame["id"] for frame in read(api, job, **{"last-event-id": "4"})] == ["5", "6"]


def test_after_the_end_nobody_needs_to_come_back(api: Api, job: str):
    work(api, job)
    answer = api.http.get(f"/train/{job}/events", headers={**SSE, "last-event-id": "6"})
    assert answer.status_code == 204


def test_a_quiet_stream_has_a_heart(api: Api, job: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(sse, "WAIT_S", 0.1)
    with api.http.stream("GET", f"/train/{job}/events", headers=SSE, timeout=10) as answer:
        told = frames(answer.iter_lines())
        assert next(told)["event"] == "queued"
        assert "comment" in next(told)
        assert "comment" in next(told)


def test_refusals(api: Api, job: str):
    assert_problem(api.http.get("/train/job_0/events", headers=SSE), 404, "job_not_found")
    answer = api.http.get(f"/train/{job}/events", headers={**SSE, "last-event-id": "x"})
    assert "'x'" in assert_problem(answer, 400, "bad_request")["detail"]


def test_without_the_header_it_is_a_page(api: Api, job: str):
    answer: httpx.Response = api.http.get(f"/train/{job}/events", headers={"accept": "*/*"})
    assert answer.json()["events"][0]["type"] == "queued"
