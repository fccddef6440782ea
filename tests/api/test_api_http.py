"""What is true of every request: ids, problems, sizes, the schema, health."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lensrack import wire
from server.api import forms, params, raw_pixels, receiving
from server.api.binding import UnsafeBind, is_loopback, require_safe_bind
from server.settings import Settings
from tests.api.api_server import Api, assert_problem, read_response, serving
from tests.serving.floor import png, publish

JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    with serving(home, max_body_bytes=5000, max_json_bytes=2000, max_bundle_bytes=4000, max_dataset_bytes=6000) as api:
        publish(api.floor.store)
        yield api


# --- ids and logs -----------------------------------------------------------------------------------------------------


def test_every_response_has_an_id_and_a_sane_one_of_the_client_is_kept(api: Api):
    assert re.fullmatch("[0-9a-f]{32}", api.http.get("/healthz").headers["x-request-id"])
    assert api.http.get("/healthz", headers={"X-Request-Id": "abc-1.2_Z"}).headers["x-request-id"] == "abc-1.2_Z"
    for bad in ("a b", "é".encode(), "x" * 129, "a;b", ""):
        assert api.http.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad
    assert api.http.get("/nowhere").headers["x-request-id"]


def test_the_access_log_has_one_line_a_request_with_its_id(api: Api, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, "server.access"):
        api.http.get("/tasks/fish%0aINJECTED", headers={"X-Request-Id": "log-me"})
        time.sleep(0.05)
    (line,) = [record.getMessage() for record in caplog.records if "log-me" in record.getMessage()]
    assert re.fullmatch(r"GET /tasks/fish%0aINJECTED 400 [\d.]+ ms log-me", line)


def test_requests_are_counted_by_route_template(api: Api):
    for task in ("fish", "nobody", "nobody-else"):
        api.http.get(f"/tasks/{task}")
    api.http.get("/wp-admin.php")
    time.sleep(0.05)
    text = api.http.get("/metrics").text
    assert 'lensrack_requests_total{method="GET",route="/tasks/{task}",status="404"}' in text
    assert 'route="unmatched",status="404"' in text
    assert "nobody" not in text
    assert "wp-admin" not in text


# --- problems ---------------------------------------------------------------------------------------------------------


def test_routing_errors_are_problems(api: Api):
    assert_problem(api.http.get("/nowhere"), 404, "not_found")
    refused = api.http.delete("/healthz")
    assert_problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "GET, HEAD"
    assert_problem(api.http.get("/tasks/"), 404, "not_found")


def test_validation_names_field_expected_and_actual(api: Api):
    problem = assert_problem(
        api.http.post("/predict/fish?top_k=0", content=png(), headers=JPEG), 422, "invalid_request"
    )
    (error,) = problem["errors"]
    assert error["field"] == "top_k"
    assert "greater than or equal to 1" in error["expected"]
    assert error["actual"] == "'0'"
    assert "top_k" in problem["detail"]


def test_a_body_that_is_no_json(api: Api):
    answer = api.http.post("/train", content=b"{nonsense", headers={"content-type": "application/json"})
    assert "JSON" in assert_problem(answer, 400, "bad_request")["detail"]
    answer = api.http.post("/train", content=b"\xff\xfe", headers={"content-type": "application/json"})
    assert_problem(answer, 400, "bad_request")
    answer = api.http.post("/train", content=b'{"task": "a"}', headers={"content-type": "text/plain"})
    assert_problem(answer, 422, "invalid_request")


def test_an_unknown_field_is_refused_and_long_values_are_cut(api: Api):
    answer = api.http.post("/train", json={"task": "a" * 1000, "dataset": "d", "epochz": 3})
    problem = assert_problem(answer, 422, "invalid_request")
    found = {error["field"]: error for error in problem["errors"]}
    assert found["epochz"]["expected"] == "expected no such field"
    assert len(found["task"]["actual"]) <= 101


def test_the_unforeseen_is_logged_with_the_id_and_says_nothing(api: Api, caplog: pytest.LogCaptureFixture):
    tasks = api.floor.store.tasks
    api.floor.store.tasks = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    try:
        answer = api.http.get("/tasks", headers={"X-Request-Id": "boom"})
    finally:
        api.floor.store.tasks = tasks  # type: ignore[method-assign]
    problem = assert_problem(answer, 500, "internal")
    assert "division" not in answer.text
    assert problem["request_id"] == "boom"
    assert any("boom" in record.getMessage() and record.exc_info for record in caplog.records)


# --- sizes ------------------------------------------------------------------------------------------------------------

CAPPED = [
    ("POST /predict/fish", "image/jpeg", 5000),
    ("POST /predict?task=fish", "multipart/form-data; boundary=x", 5000),
    ("POST /embed", "application/json", 5000),
    ("POST /train", "application/json", 2000),
    ("PUT /tasks/fish/aliases/live", "application/json", 2000),
    ("PUT /tasks/fish/versions", "application/octet-stream", 4000),
    ("POST /datasets", "application/zip", 6000),
]


PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\nContent-Type: image/jpeg\r\n\r\n'


@pytest.mark.parametrize(("route", "kind", "cap"), CAPPED)
@pytest.mark.parametrize("chunked", [False, True])
def test_each_route_has_its_cap(api: Api, route: str, kind: str, cap: int, chunked: bool):
    method, path = route.split()

    def body(size: int) -> Iterator[bytes]:
        if kind.startswith("multipart"):  # without a beginning the parser may refuse it before the cap is met
            yield PART
            size -= len(PART)
        for _ in range(size // 500):
            yield b"x" * 500
        yield b"x" * (size % 500)

    def send(size: int) -> httpx.Response:
        content = body(size) if chunked else b"".join(body(size))
        return api.http.request(method, path, content=content, headers={"content-type": kind})

    problem = assert_problem(send(cap + 1), 413, "body_too_large")
    assert f"at most {cap} bytes" in problem["detail"]
    assert send(cap).status_code != 413


def test_a_length_that_promises_too_much_is_refused_before_a_byte_is_read(api: Api):
    for length in ("5001", "9" * 18, "9" * 30):
        status, got = api.raw(
            head=f"POST /predict/fish HTTP/1.1\nHost: [::1]\nContent-Type: image/jpeg\nContent-Length: {length}"
        )
        assert status in (413, 400), got  # a number no parser can hold is the HTTP parser's own 400
    assert api.http.get("/healthz").status_code == 200


def test_a_length_that_promises_too_little_cuts_the_body_there(api: Api):
    head = "POST /predict/fish HTTP/1.1\nHost: [::1]\nConnection: close\nContent-Type: image/png\nContent-Length: 10"
    status, got = api.raw(head=head, body=png() + b"y" * 9000)
    assert status == 400
    assert b"bad_image" in got


def test_a_body_that_never_comes_holds_nobody_else_up(api: Api):
    with socket.create_connection(("127.0.0.1", api.port)) as sock:
        sock.sendall(
            b"POST /predict/fish HTTP/1.1\r\nHost: [::1]\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nabc"
        )
        assert api.http.post("/predict/fish", content=png(), headers={"content-type": "image/png"}).status_code == 200


def test_chunks_that_never_end_are_cut_off(api: Api):
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as sock:
        sock.sendall(
            b"POST /predict/fish HTTP/1.1\r\nHost: [::1]\r\n"
            b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(60):
            sock.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
        got = read_response(sock)
    assert got.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in got


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_documents_bodies_and_problems(api: Api):
    schema = api.http.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    paths = schema["paths"]
    bodies = paths["/predict/{task}"]["post"]["requestBody"]["content"]
    assert {*params.IMAGE_TYPES, params.OCTETS, raw_pixels.NPY, forms.FORM, "application/json"} == set(bodies)
    assert {*params.ARCHIVE_TYPES, forms.FORM} == set(paths["/datasets"]["post"]["requestBody"]["content"])
    for path, operations in paths.items():
        for method, operation in operations.items():
            problem = operation["responses"]["default"]["content"]
            kind = "json" if path.startswith(("/v1", "/v2")) else "problem+json"
            assert list(problem) == [f"application/{kind}"], (method, path)
            assert "422" not in operation["responses"]


def test_every_reference_in_the_schema_leads_somewhere(api: Api):
    text = api.http.get("/openapi.json").text
    schema = json.loads(text)
    references = set(re.findall(r'"\$ref":\s*"([^"]+)"', text))
    assert "#/components/schemas/Problem" in references
    for reference in references:
        target = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_every_route_of_the_design_is_there(api: Api):
    schema = api.http.get("/openapi.json").json()
    served = {(method.upper(), path) for path, operations in schema["paths"].items() for method in operations}
    assert served >= {
        ("POST", "/predict/{task}"), ("POST", "/predict"), ("POST", "/embed"),
        ("GET", "/tasks"), ("GET", "/tasks/{task}"), ("DELETE", "/tasks/{task}"),
        ("GET", "/tasks/{task}/versions"), ("PUT", "/tasks/{task}/versions"),
        ("GET", "/tasks/{task}/versions/{version}"), ("DELETE", "/tasks/{task}/versions/{version}"),
        ("GET", "/tasks/{task}/versions/{version}/bundle"),
        ("PUT", "/tasks/{task}/aliases/{alias}"), ("POST", "/tasks/{task}/rollback"),
        ("GET", "/tasks/{task}/aliases/{alias}/history"),
        ("POST", "/tasks/{task}/load"), ("POST", "/tasks/{task}/unload"), ("POST", "/tasks/{task}/pin"),
        ("POST", "/datasets"), ("GET", "/datasets"), ("GET", "/datasets/{dataset_id}"),
        ("DELETE", "/datasets/{dataset_id}"),
        ("POST", "/train"), ("GET", "/train"), ("GET", "/train/{job_id}"), ("POST", "/train/{job_id}/cancel"),
        ("GET", "/train/{job_id}/events"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"),
    }  # fmt: skip
    assert api.http.get("/docs").status_code == 200


# --- health -----------------------------------------------------------------------------------------------------------


def test_health(api: Api):
    assert wire.Health.model_validate(api.http.get("/healthz").json()).status == "ok"
    assert api.http.get("/readyz").json()["ready"] is True
    api.ready.update(ready=False, checks={"store": "does not answer"})
    try:
        answer = api.http.get("/readyz")
    finally:
        api.ready.update(ready=True, checks={})
    assert answer.status_code == 503
    assert answer.json()["checks"] == {"store": "does not answer"}


# --- where it may listen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str):
    assert is_loopback(host)
    require_safe_bind(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "", "127.0.0.1.example.org"])
def test_anything_else_needs_the_setting(host: str):
    with pytest.raises(UnsafeBind, match="LENSRACK_ALLOW_OPEN"):
        require_safe_bind(Settings(host=host))
    require_safe_bind(Settings(host=host, allow_open=True))


def test_uploads_of_the_dead_are_swept_and_those_of_the_living_kept(tmp_path: Path):
    import fcntl

    (tmp_path / receiving.FOLDER).mkdir()
    dead, living = (tmp_path / receiving.FOLDER / name for name in ("dead", "living"))
    dead.write_bytes(b"x")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert receiving.sweep(tmp_path) == 1
    assert not dead.exists()
    assert living.exists()


# --- slow bodies ------------------------------------------------------------------------------------------------------


def test_a_body_that_trickles_is_ended_and_a_slow_answer_is_not(tmp_path: Path):
    with serving(tmp_path, body_timeout_s=0.5) as slow:
        publish(slow.floor.store)
        for head in (
            "POST /predict/fish HTTP/1.1\nHost: localhost\nContent-Type: image/png\nContent-Length: 100",
            "POST /train HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 100",
        ):
            status, got = slow.raw(head=head, body=b"{")
            assert status == 408, got
            assert b'"body_timeout"' in got
            assert b"within 0.5 s, got 1 bytes" in got
        slow.floor.engine.gate.clear()
        asked = threading.Timer(1.0, slow.floor.engine.gate.set)
        asked.start()
        assert slow.http.post("/predict/fish", content=png(), headers={"content-type": "image/png"}).status_code == 200
        asked.join()


def test_an_archive_may_take_its_time_but_not_fall_silent(tmp_path: Path):
    with serving(tmp_path, body_timeout_s=0.2, upload_silence_s=1.0) as slow:

        def trickling() -> Iterator[bytes]:
            for _ in range(4):
                yield b"x"
                time.sleep(0.2)

        answer = slow.http.post("/datasets", content=trickling(), headers={"content-type": "application/zip"})
        assert_problem(answer, 400, "bad_archive")
        head = "POST /datasets HTTP/1.1\nHost: localhost\nContent-Type: application/zip\nContent-Length: 100"
        status, got = slow.raw(head=head, body=b"PK")
        assert status == 408
        assert b'"upload_silent"' in got
