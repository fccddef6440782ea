"""Predictions over a real socket: every envelope, every refusal, and what becomes of clients that leave."""

from __future__ import annotations

import base64
import re
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import lensrack
from lensrack import wire
from server.observability import metrics
from tests.api.api_server import Api, assert_problem, serving
from tests.api.garbage import collected
from tests.serving.floor import FINGERPRINT, bundle, png, publish

PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), request_timeout_s=10) as api:
        publish(api.floor.store)
        yield api


def ask(api: Api, path: str = "/predict/fish", content: bytes | None = None, **headers: str) -> httpx.Response:
    body = png() if content is None else content
    return api.http.post(path, content=body, headers={**PNG, **headers})


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


# --- envelopes --------------------------------------------------------------------------------------------------------


def test_a_request_leaves_nothing_of_ours_to_the_garbage_collector(api: Api):
    ask(api)
    with collected() as garbage:
        assert [ask(api).status_code for _ in range(3)] == [200] * 3
    ours = (type(one).__module__ for one in garbage if not isinstance(one, partial))
    bound = (one.func for one in garbage if isinstance(one, partial))
    assert [name for name in ours if name.startswith("server.")] == []
    assert [one for one in bound if getattr(one, "__module__", "").startswith("server.")] == []


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "image/bmp", "IMAGE/PNG; q=1"])
def test_raw_bytes(api: Api, kind: str):
    answer = ask(api, **{"content-type": kind})
    assert answer.status_code == 200
    told = wire.PredictResponse.model_validate(answer.json())
    assert told.task == "fish"
    assert (
        answer.headers["lensrack-version"] == told.version == api.floor.store.aliases("fish")["live"].targets[0].version
    )
    assert len(told.predictions) == 1
    assert {one.label for one in told.predictions[0]} == {"a", "b", "c"}
    assert sum(one.score for one in told.predictions[0]) == pytest.approx(1)


def test_an_ensemble_is_the_mean_over_http_and_names_its_versions(api: Api):
    """By curl's plus sign in the path, by its code, by a blank in a query, and by the SDK."""
    store = api.floor.store
    first, second = publish(store, "pair", seed=1), store.put(bundle("pair", seed=2, labels=("b", "c", "a")))
    store.set_alias("pair", "candidate", second)

    def of(path: str) -> dict[str, float]:
        answer = ask(api, path)
        assert answer.status_code == 200, answer.text
        return {one["label"]: one["score"] for one in answer.json()["predictions"][0]}

    one, other = of("/predict/pair@live"), of("/predict/pair@candidate")
    expected = pytest.approx({label: (one[label] + other[label]) / 2 for label in one}, abs=1e-6)
    assert of("/predict/pair@live+candidate") == expected == of("/predict/pair@live%2Bcandidate")
    told = ask(api, "/predict/pair@live+candidate")
    assert told.json()["versions"] == [first, second]
    assert told.json()["version"] == told.headers["lensrack-version"] == f"{first}+{second}"
    assert "versions" not in ask(api, "/predict/pair@live").json()
    many = ask(api, "/predict?task=pair@live+candidate&task=pair").json()["results"]
    assert many["pair@live+candidate"]["versions"] == [first, second]
    assert {best["label"]: best["score"] for best in many["pair@live+candidate"]["predictions"][0]} == expected
    with lensrack.Client(api.url) as client:
        answer = client.predict("pair@live+candidate", png())
        assert answer.versions == (first, second)
        assert {best.label: best.score for best in answer} == expected
        assert client.predict("pair", png()).versions == (first,)
        both = client.predict_many(["pair@live+candidate", "pair"], png())
        assert both["pair@live+candidate"].versions == (first, second)


def test_server_timing_tells_each_step_in_milliseconds(api: Api):
    timing = ask(api).headers["server-timing"]
    steps = re.fullmatch(r"decode;dur=([\d.]+), queue;dur=([\d.]+), compute;dur=([\d.]+)", timing)
    assert steps, timing
    assert float(steps[1]) > 0
    assert all(float(step) < 5000 for step in steps.groups())


def test_multipart_and_json_keep_the_order_of_images(api: Api):
    greys = [6, 7, 8, 6]
    files = [("images", (f"{grey}.png", png(grey), "image/png")) for grey in greys]
    form = api.http.post("/predict/fish?top_k=1", files=files)
    encoded = api.http.post("/predict/fish?top_k=1", json={"images": [b64(png(grey)) for grey in greys]})
    single = [ask(api, "/predict/fish?top_k=1", png(grey)).json()["predictions"][0] for grey in greys]
    assert form.json()["predictions"] == encoded.json()["predictions"] == single
    assert len({of_image[0]["label"] for of_image in single}) == 3


def test_top_k(api: Api):
    assert len(ask(api, "/predict/fish?top_k=2").json()["predictions"][0]) == 2
    assert len(ask(api, "/predict/fish?top_k=1000").json()["predictions"][0]) == 3
    for bad in ("0", "1001", "-1", "many", ""):
        assert_problem(ask(api, f"/predict/fish?top_k={bad}"), 422, "invalid_request")


def test_references(api: Api):
    version = api.floor.store.put(bundle(seed=5))
    api.floor.store.set_alias("fish", "stable", version)
    for ref in (f"fish@{version}", f"fish@{version[:9]}", "fish@stable"):
        assert ask(api, f"/predict/{ref}").json()["version"] == version


def test_a_canary_sticks_to_the_clients_key(api: Api):
    one, two = (api.floor.store.put(bundle("canary", seed)) for seed in (1, 2))
    api.floor.store.set_alias("canary", "live", {one: 0.5, two: 0.5})
    asked = [f"user-{i}" for i in range(12)] * 3
    by_key: dict[str, set[str]] = {key: set() for key in asked}
    for key in asked:
        by_key[key].add(ask(api, "/predict/canary", **{"lensrack-key": key}).json()["version"])
    assert all(len(versions) == 1 for versions in by_key.values())
    assert {version for versions in by_key.values() for version in versions} == {one, two}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_not_an_image(api: Api):
    assert "0 bytes" in assert_problem(ask(api, content=b""), 400, "bad_image")["detail"]
    assert_problem(ask(api, content=png()[:60]), 400, "bad_image")
    assert_problem(ask(api, content=b"GIF89a" + b"\0" * 100), 415, "unsupported_image")
    assert_problem(ask(api, content=png(size=200)), 413, "image_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "application/pdf", "video/mp4"])
def test_a_content_type_of_something_else(api: Api, kind: str):
    answer = api.http.post("/predict/fish", content=png(), headers={"content-type": kind})
    detail = assert_problem(answer, 415, "unsupported_media_type")["detail"]
    assert "image/jpeg" in detail
    assert kind in detail


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"images": []}, 422, "invalid_request", "images"),
        ({}, 422, "invalid_request", "images"),
        ({"images": [{"b64": "!!!"}]}, 422, "invalid_request", "images.0.b64"),
        ({"images": [{"b64": "AAA"}]}, 422, "invalid_request", "base64"),
        ({"images": [{"b64": "é"}]}, 422, "invalid_request", "base64"),
        ({"images": [{"url": "http://example.org"}]}, 422, "invalid_request", "images.0"),
        ({"images": [{"b64": ""}]}, 400, "bad_image", ""),
        ({"images": [{"b64": "aGVsbG8="}]}, 415, "unsupported_image", ""),
        ([1, 2], 422, "invalid_request", "body"),
    ],
)
def test_json_bodies(api: Api, body: Any, status: int, code: str, says: str):
    assert says in assert_problem(api.http.post("/predict/fish", json=body), status, code)["detail"]


def test_json_that_is_none(api: Api):
    answer = api.http.post("/predict/fish", content=b"{", headers={"content-type": "application/json"})
    assert_problem(answer, 400, "bad_request")
    answer = api.http.post("/predict/fish", content=b"[" * 5000, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)


def test_multipart_bodies(api: Api):
    post = api.http.post
    two = [("images", png()), ("picture", png())]
    assert "'picture'" in assert_problem(post("/predict/fish", files=two), 422, "invalid_request")["detail"]
    told = assert_problem(post("/predict/fish", data={"images": "7.png"}, files={"x": png()}), 422, "invalid_request")
    assert "the text '7.png' in 'images'; a file has a filename" in told["detail"]
    no_boundary = post("/predict/fish", content=b"x", headers={"content-type": "multipart/form-data"})
    assert_problem(no_boundary, 400, "bad_request")
    empty = post("/predict/fish", content=b"--x--\r\n", headers={"content-type": "multipart/form-data; boundary=x"})
    assert_problem(empty, 422, "invalid_request")
    too_many = post("/predict/fish", files=[("images", png())] * 17)
    assert "16" in assert_problem(too_many, 400, "bad_request")["detail"]


def test_too_many_images(api: Api):
    detail = assert_problem(api.http.post("/predict/fish", json={"images": [b64(png())] * 17}), 422, "invalid_request")[
        "detail"
    ]
    assert detail == "images: expected 1 to 16, got 17"


def test_one_bad_image_of_many_is_named(api: Api):
    problem = assert_problem(
        api.http.post("/predict/fish", json={"images": [b64(png()), b64(png()[:60])]}), 400, "bad_image"
    )
    assert problem["detail"].startswith("image 1: ")
    assert problem["image"] == 1


@pytest.mark.parametrize(
    ("task", "status", "code"),
    [
        ("nobody", 404, "task_not_found"),
        ("fish@nobody", 404, "alias_not_found"),
        ("fish@" + "0" * 64, 404, "version_not_found"),
        ("Fish", 400, "bad_task_name"),
        ("a" * 65, 400, "bad_task_name"),
        ("fi%20sh", 400, "bad_task_name"),
        ("..%2f..%2fetc", 404, "not_found"),
        ("fish%00", 400, "bad_task_name"),
    ],
)
def test_tasks_that_cannot_answer(api: Api, task: str, status: int, code: str):
    detail = assert_problem(ask(api, f"/predict/{task}"), status, code)["detail"]
    assert "[a-z0-9]" in detail or code != "bad_task_name"


def test_a_wrong_name_is_the_same_problem_wherever_it_is_named(api: Api):
    """And nothing else of the request is looked at before: not its body, its type, or its other parameters."""
    told = []
    for path in (
        "/predict/No!",
        "/predict/No!?unknown=1",
        "/predict?task=No!",
        "/tasks/No!/attention",
        "/tasks/No!/pin",
    ):
        told.append(assert_problem(api.http.post(path, content=b"?"), 400, "bad_task_name")["detail"])
    told.append(assert_problem(api.http.get("/tasks/No!"), 400, "bad_task_name")["detail"])
    for path in ("/v2/models/No!/infer", "/v2/models/No!/versions/live/infer", "/v2/repository/models/No!/load"):
        told.append(api.http.post(path, content=b"?").json()["error"])
    told.append(api.http.get("/v1/models/No!").json()["error"]["message"])
    assert set(told) == {told[0]}


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "11", "soon", ""])
def test_timeouts_out_of_range(api: Api, timeout: str):
    problem = assert_problem(ask(api, **{"lensrack-timeout": timeout}), 422, "invalid_request")
    assert "up to 10" in problem["detail"]


# --- many tasks -------------------------------------------------------------------------------------------------------


def test_many_tasks_in_one_request(api: Api):
    versions = {
        "fish": api.floor.store.aliases("fish")["live"].targets[0].version,
        "bird": publish(api.floor.store, "bird"),
    }
    answer = ask(api, "/predict?task=fish&task=bird&top_k=1")
    told = wire.ManyPredictResponse.model_validate(answer.json())
    assert {task: result.version for task, result in told.results.items()} == versions
    assert all(result.error is None and len(result.predictions[0]) == 1 for result in told.results.values())
    assert "compute;dur=" in answer.headers["server-timing"]


def test_one_failing_task_has_its_problem_in_its_place(api: Api):
    answer = ask(api, "/predict?task=fish&task=nobody&task=fish@gone", **{"x-request-id": "many"})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert results["fish"]["predictions"]
    assert "error" not in results["fish"]
    assert results["nobody"]["error"]["code"] == "task_not_found"
    assert results["nobody"]["error"]["status"] == 404
    assert results["nobody"]["error"]["request_id"] == "many"
    assert results["fish@gone"]["error"]["code"] == "alias_not_found"


def test_when_no_task_answers_the_request_is_the_problem(api: Api):
    assert_problem(ask(api, "/predict?task=nobody&task=fish@gone"), 404, "task_not_found")
    assert_problem(ask(api, "/predict?task=fish", b"\x89PNG"), 400, "bad_image")
    assert_problem(ask(api, "/predict"), 422, "invalid_request")
    assert_problem(ask(api, "/predict?task=fish&task=NO"), 400, "bad_task_name")


def test_embed(api: Api):
    answer = api.http.post("/embed", files=[("images", png(3)), ("images", png(9))])
    told = wire.EmbedResponse.model_validate(answer.json())
    assert told.fingerprint == FINGERPRINT
    assert told.embeddings == [[3, 1, 2], [9, 1, 2]]
    assert_problem(api.http.post("/embed", content=b"", headers=PNG), 400, "bad_image")


# --- the engine in trouble --------------------------------------------------------------------------------------------


def test_an_engine_failure_is_the_culprits_alone_and_says_nothing_of_the_inside(api: Api):
    api.floor.engine.culprit = lambda image: image[0, 0, 0] == 99
    try:
        problem = assert_problem(ask(api, content=png(99)), 500, "engine_failed")
        assert ask(api, content=png(98)).status_code == 200
    finally:
        api.floor.engine.culprit = lambda image: False
    assert "passwd" not in str(problem)


def test_numbers_that_are_not_finite(api: Api):
    api.floor.engine.distort = lambda values: values * float("nan")
    try:
        assert_problem(ask(api), 500, "engine_failed")
    finally:
        api.floor.engine.distort = lambda values: values


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Api]:
    """One row a forward, four in the queue: easily full."""
    with serving(tmp_path, max_batch=1, max_queue=4) as api:
        publish(api.floor.store)
        assert ask(api).status_code == 200
        api.floor.engine.batches.clear()
        api.floor.engine.entered.clear()
        yield api
        api.floor.engine.gate.set()
        until(lambda: api.floor.shelf.in_use == 0)


def until(true: Any) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def departed() -> float:
    return metrics.REGISTRY.get_sample_value("lensrack_rows_total", {"outcome": "departed"}) or 0.0


class Client(threading.Thread):
    """A request of its own thread; `answer` once joined."""

    def __init__(self, api: Api, grey: int) -> None:
        super().__init__()
        self.api, self.grey = api, grey
        self.answer: httpx.Response
        self.start()

    def run(self) -> None:
        self.answer = httpx.post(f"{self.api.url}/predict/fish", content=png(self.grey), headers=PNG, timeout=20)


def test_a_full_queue_is_429_with_retry_after(narrow: Api):
    narrow.floor.engine.gate.clear()
    waiting = [Client(narrow, 1)]
    assert narrow.floor.engine.entered.wait(10)
    waiting += [Client(narrow, grey) for grey in (2, 3, 4, 5)]
    until(lambda: len(narrow.floor.batcher) == 4)
    refused = ask(narrow)
    assert_problem(refused, 429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    narrow.floor.engine.gate.set()
    for client in waiting:
        client.join()
    assert [client.answer.status_code for client in waiting] == [200] * 5


def test_a_client_that_leaves_is_dropped_before_the_forward(narrow: Api):
    narrow.floor.engine.gate.clear()
    first = Client(narrow, 1)
    assert narrow.floor.engine.entered.wait(10)
    before = departed()
    body = png(77)
    with socket.create_connection(("127.0.0.1", narrow.port)) as sock:
        head = "POST /predict/fish HTTP/1.1\r\nHost: [::1]\r\nContent-Type: image/png\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        until(lambda: len(narrow.floor.batcher) == 1)
    time.sleep(0.1)  # the server hears of it while the engine is still busy
    narrow.floor.engine.gate.set()
    first.join()
    assert ask(narrow, content=png(5)).status_code == 200
    assert ("fish", 77) not in narrow.floor.engine.rows
    assert departed() == before + 1
    gone = {"route": "/predict/{task}", "method": "POST", "status": "499"}
    until(lambda: metrics.REGISTRY.get_sample_value("lensrack_requests_total", gone))


def test_a_deadline_is_504_and_its_row_is_not_computed(narrow: Api):
    narrow.floor.engine.gate.clear()
    first = Client(narrow, 1)
    assert narrow.floor.engine.entered.wait(10)
    started = time.monotonic()
    late = ask(narrow, content=png(88), **{"lensrack-timeout": "0.1"})
    assert 0.1 <= time.monotonic() - started < 5
    assert_problem(late, 504, "deadline_exceeded")
    narrow.floor.engine.gate.set()
    first.join()
    assert ask(narrow, content=png(5)).status_code == 200
    assert ("fish", 88) not in narrow.floor.engine.rows


def test_shutting_down_is_503(tmp_path: Path):
    with serving(tmp_path) as api:
        publish(api.floor.store)
        assert ask(api).status_code == 200
        api.floor.batcher._closing = True
        refused = ask(api)
        assert_problem(refused, 503, "shutting_down")
        assert refused.headers["retry-after"]
