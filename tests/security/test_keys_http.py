"""Keys over HTTP, on a real server: who gets in, what each scope may do, which web pages are kept out."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from server.api import app, scopes
from server.api.binding import UnsafeBind, require_safe_bind
from server.api.middleware import auth
from server.datasets import upload_store
from server.keys.key import SCOPES
from server.settings import Settings
from tests.api.api_server import Api, assert_problem, assert_refused, serving
from tests.datasets.test_dataset_store import noise, write_zip
from tests.serving.floor import png, publish

PNG = {"content-type": "image/png"}
ZIP = {"content-type": "application/zip"}
NAMES = ("predict", "train", "admin", "acme", "other", "slow", "small")
TOKENS = {name: f"token-of-{name}-{'x' * 20}" for name in NAMES}


def keys_file(home: Path) -> Path:
    rows: list[dict[str, Any]] = [
        *({"id": scope, "scopes": [scope]} for scope in SCOPES),
        {"id": "acme", "scopes": ["admin"], "tasks": "acme-"},
        {"id": "other", "scopes": ["admin"], "tasks": "other-"},
        {"id": "small", "scopes": ["predict", "train"], "tasks": "small-", "bytes_stored": 2 * len(png())},
        {"id": "slow", "scopes": ["predict", "train"], "images_per_s": 0.05, "jobs_per_day": 1, "bytes_stored": 10},
    ]
    path = home / "keys"
    path.write_text("\n".join(json.dumps(row | {"token": TOKENS[row["id"]]}) for row in rows))
    return path


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    with serving(home, keys_file=keys_file(home)) as api:
        for task in ("fish", "acme-fish", "other-fish", "small-fish"):
            publish(api.floor.store, task)
        yield api


@pytest.fixture(scope="module")
def open_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Without any keys."""
    with serving(tmp_path_factory.mktemp("open")) as api:
        publish(api.floor.store)
        yield api


def operations(api: Api) -> Iterator[tuple[str, str, str]]:
    """Method, template and a path of it, of every route that the schema knows."""
    schema = api.http.get("/openapi.json", headers=bearer("admin")).json()
    for template, found in schema["paths"].items():
        for method in found:
            yield method.upper(), template, re.sub(r"\{[^}]+\}", "0", template)


# --- who gets in ------------------------------------------------------------------------------------------------------


def test_every_route_has_a_line_that_says_what_it_needs(api: Api) -> None:
    """Somebody who adds a route decides whom it is for, and until then it is for `admin` only."""
    routes = {(method, template) for method, template, _ in operations(api)}
    assert routes <= scopes.NEEDS.keys(), "say in server/api/scopes.py which scope a new route needs"
    unseen = {route for _, route in scopes.NEEDS.keys() - routes}
    assert unseen == {"/", "/ui/{path:path}", "/openapi.json", "/docs"}


def test_the_check_before_the_body_takes_each_route_for_itself(api: Api) -> None:
    """It goes by the listed route that a path looks like; the check of the route that answers only confirms it."""
    for method, template, path in operations(api):
        assert scopes.match(method, path)[0] == template


def test_every_route_asks_for_a_key(api: Api) -> None:
    seen = 0
    for method, template, path in operations(api):
        if scopes.NEEDS[method, template] == "open":
            continue
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKENS['admin']}"}):
            answer = api.http.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == 'Bearer realm="lensrack"'
            if method != "HEAD":
                assert_refused(answer, 401, "unauthenticated")
        seen += 1
    assert seen > 35


@pytest.mark.parametrize("path", ["/nowhere", "/docs", "/openapi.json", "/metrics", "/tasks/", "/TASKS"])
def test_what_is_there_is_not_told_to_strangers(api: Api, path: str) -> None:
    assert_problem(api.http.get(path), 401, "unauthenticated")


def test_a_route_that_nobody_listed_is_for_admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the path looks like that of another route."""
    module = SimpleNamespace(router=APIRouter())
    module.router.add_api_route("/extra", lambda: "extra")
    module.router.add_api_route("/tasks/extra", lambda: "extra")
    monkeypatch.setattr(app, "_ROUTE_MODULES", (module, *app._ROUTE_MODULES))
    with serving(tmp_path, keys_file=keys_file(tmp_path)) as api:
        for path in ("/extra", "/tasks/extra"):
            assert_problem(api.http.get(path), 401, "unauthenticated")
            assert_problem(api.http.get(path, headers=bearer("predict")), 403, "forbidden")
            assert api.http.get(path, headers=bearer("admin")).json() == "extra"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/ui/app.js", "/session"])
def test_probes_and_the_page_to_sign_in_are_open(api: Api, path: str) -> None:
    assert api.http.get(path).status_code == 200


def test_each_scope_opens_its_routes_and_no_others(api: Api) -> None:
    """A route is passed when it fails for another reason than the key."""
    for method, template, path in operations(api):
        need = scopes.NEEDS[method, template]
        for scope in SCOPES:
            answer = api.http.request(method, path, headers=bearer(scope))
            assert answer.status_code != 401, (method, path, scope)
            refused = need in SCOPES and scope not in (need, "admin")
            assert (answer.status_code == 403) == refused, (method, path, scope, answer.text)
            if refused and method != "HEAD":
                told = assert_refused(answer, 403, "forbidden")
                assert told.get("scope", need) == need


def test_a_body_of_a_stranger_is_not_read(api: Api) -> None:
    """The answer comes although the body never does."""
    for line in ("POST /datasets", "POST /train", "POST /predict/fish"):
        status, got = api.raw(head=f"{line} HTTP/1.1\nHost: localhost\nContent-Length: 1000000000")
        assert status == 401, got


def test_metrics_are_for_keys_of_all_tasks(api: Api, tmp_path: Path) -> None:
    assert_problem(api.http.get("/metrics", headers=bearer("acme")), 403, "forbidden")
    assert api.http.get("/metrics", headers=bearer("predict")).status_code == 200
    with serving(tmp_path, keys_file=keys_file(tmp_path), open_metrics=True) as shown:
        assert shown.http.get("/metrics").status_code == 200
        assert shown.http.get("/tasks").status_code == 401


def test_tokens_are_in_no_log_and_no_answer(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        answers = [
            api.http.get("/tasks", headers=bearer("admin")),
            api.http.get("/tasks", headers={"Authorization": "Bearer wrong-but-secret"}),
            api.http.post("/session", json={"key": TOKENS["admin"]}),
            api.http.post("/session", json={"key": "wrong-but-secret"}),
        ]
    api.http.cookies.clear()
    said = caplog.text + "".join(answer.text for answer in answers)
    assert TOKENS["admin"] not in said
    assert "wrong-but-secret" not in said


def test_a_revoked_key_is_out_and_a_new_one_in_without_a_restart(tmp_path: Path) -> None:
    path = keys_file(tmp_path)
    with serving(tmp_path, keys_file=path) as api:
        assert api.http.get("/tasks", headers=bearer("predict")).status_code == 200
        path.write_text(json.dumps({"id": "new", "scopes": ["predict"], "token": TOKENS["train"]}))
        patience = time.monotonic() + 60
        while api.http.get("/tasks", headers=bearer("predict")).status_code != 401:
            assert time.monotonic() < patience, "the old key stays"
            time.sleep(0.05)
        assert api.http.get("/tasks", headers=bearer("train")).status_code == 200


@pytest.mark.parametrize(
    ("way", "change"),
    [
        ("a stream", "revoked"),
        ("a stream", "another prefix"),
        ("a long poll", "another scope"),
        ("a long poll", "another token"),
    ],
)
def test_whoever_listens_to_a_job_does_not_outlive_the_key(tmp_path: Path, way: str, change: str) -> None:
    path = keys_file(tmp_path)
    with serving(tmp_path, keys_file=path) as api:
        job = api.services.jobs.submit("acme-fish", "none", "linear", {}, max_attempts=1).id
        events, asked = api.services.jobs.events, threading.Event()
        after = events(job)[-1].seq

        def watched(*arguments: Any) -> Any:
            asked.set()
            return events(*arguments)

        api.services.jobs.events = watched  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            listening = pool.submit(listen, api, way, job, after)
            assert asked.wait(60)
            rows = [json.loads(line) for line in path.read_text().splitlines() if '"acme"' not in line]
            anew = {
                "revoked": [],
                "another scope": [{"scopes": ["predict"], "tasks": "acme-", "token": TOKENS["acme"]}],
                "another prefix": [{"scopes": ["admin"], "tasks": "acme-cats-", "token": TOKENS["acme"]}],
                "another token": [{"scopes": ["admin"], "tasks": "acme-", "token": f"new-{TOKENS['acme']}"}],
            }[change]
            path.write_text("\n".join(json.dumps(row) for row in [*rows, *({"id": "acme", **row} for row in anew)]))
            status, heard = listening.result(60)
        assert status == {"a stream": 200, "a long poll": 403 if change == "another scope" else 401}[way]
        assert "finished" not in heard, "it ended by itself"


def listen(api: Api, way: str, job: str, after: int) -> tuple[int, str]:
    """All that is heard of a job that does nothing, until the server ends it."""
    if way == "a long poll":
        page = f"{api.url}/train/{job}/events?wait_s=30&after={after}"
        answer = httpx.get(page, headers=bearer("acme"), timeout=60)
        return answer.status_code, answer.text
    headers = {**bearer("acme"), "accept": "text/event-stream"}
    with httpx.stream("GET", f"{api.url}/train/{job}/events", headers=headers, timeout=60) as answer:
        return answer.status_code, "".join(answer.iter_text())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4"])
def test_a_server_with_keys_may_listen_anywhere(host: str) -> None:
    require_safe_bind(Settings(host=host), locked=True)
    with pytest.raises(UnsafeBind, match="keys create"):
        require_safe_bind(Settings(host=host))


# --- web pages --------------------------------------------------------------------------------------------------------


def test_without_keys_pages_of_other_sites_can_change_nothing(open_api: Api) -> None:
    own = f"http://127.0.0.1:{open_api.port}"
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "file://",
        "",
        "http://[",
        f"{own}.evil.example",
    ):
        for line in ("POST /tasks/fish/unload", "DELETE /tasks/fish", "POST /predict/fish"):
            method, path = line.split()
            refused = open_api.http.request(method, path, headers={**PNG, "Origin": origin}, content=png())
            assert_problem(refused, 403, "foreign_origin")
    passed = open_api.http.post("/predict/fish", headers={**PNG, "Origin": own}, content=png())
    assert passed.status_code == 200
    assert open_api.http.get("/tasks", headers={"Origin": "http://evil.example"}).status_code == 200, (
        "cannot be read there"
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:80", ""]
)
def test_a_name_that_is_not_ours_is_not_answered(open_api: Api, host: str) -> None:
    """A web page may have its own name lead to this machine, and would then be of the same origin (DNS rebinding)."""
    status, got = open_api.raw(head=f"GET /tasks HTTP/1.1\nHost: {host}")
    assert status == 421, got
    assert b"unknown_host" in got


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "127.9.9.9", "[::1]:8000", "[::1]"])
def test_local_names_are_ours(open_api: Api, host: str) -> None:
    assert open_api.raw(head=f"GET /tasks HTTP/1.1\nHost: {host}")[0] == 200


def test_other_names_are_answered_when_they_are_named(tmp_path: Path) -> None:
    with serving(tmp_path, allowed_hosts="lens.example, rack.example") as api:
        for host in ("lens.example", "RACK.example:443", "localhost"):
            assert api.raw(head=f"GET /tasks HTTP/1.1\nHost: {host}")[0] == 200
        assert api.raw(head="GET /tasks HTTP/1.1\nHost: evil.example")[0] == 421
        for origin, status in (("https://lens.example", 404), ("https://evil.example", 403)):
            head = f"POST /tasks/a/unload HTTP/1.1\nHost: localhost\nOrigin: {origin}\nContent-Length: 0"
            assert api.raw(head=head)[0] == status


def test_probes_that_call_by_address_are_answered_beyond_loopback(tmp_path: Path) -> None:
    """A kubelet and Prometheus have no name to call, and a foreign page's name is never an address."""
    with serving(tmp_path, host="0.0.0.0", allow_open=True, allowed_hosts="lens.example") as api:
        for host in ("10.0.0.1:8000", "[fd00::7]:8000", "lens.example", "127.0.0.1"):
            assert api.raw(head=f"GET /readyz HTTP/1.1\nHost: {host}")[0] == 200, host
        for host in ("server:8000", "10.0.0.1.evil.example", "0x0a000001", "10.1"):
            assert api.raw(head=f"GET /readyz HTTP/1.1\nHost: {host}")[0] == 421, host


# --- sessions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed_in(api: Api) -> Iterator[httpx.Client]:
    origin = {"Origin": api.url}
    with httpx.Client(base_url=api.url, timeout=20, headers=origin) as client:
        told = client.post("/session", json={"key": f" {TOKENS['acme']}\n"}).json()
        assert told == {"keys": True, "key": "acme", "name": "", "scopes": list(SCOPES), "tasks": "acme-"}
        yield client


def test_a_session_is_a_cookie_that_scripts_and_other_sites_cannot_use(api: Api) -> None:
    with httpx.Client(base_url=api.url, headers={"Origin": api.url}) as client:
        assert_problem(client.post("/session", json={"key": "wrong"}), 401, "unauthenticated")
        assert not client.cookies
        given = client.post("/session", json={"key": TOKENS["acme"]}).headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(given.split("; "))
        assert "Secure" not in given
        assert TOKENS["acme"] not in given
        tls = {"X-Forwarded-Proto": "https"}
        assert_problem(client.post("/session", json={"key": TOKENS["acme"]}, headers=tls), 403, "foreign_origin")
        tls["Origin"] = api.url.replace("http:", "https:")
        behind_tls = client.post("/session", json={"key": TOKENS["acme"]}, headers=tls)
        assert "Secure" in behind_tls.headers["set-cookie"].split("; ")


def test_a_session_sees_what_its_key_sees_until_it_ends(signed_in: httpx.Client) -> None:
    assert [task["task"] for task in signed_in.get("/tasks").json()["tasks"]] == ["acme-fish"]
    assert signed_in.get("/session").json()["key"] == "acme"
    stolen = {"Cookie": f"{auth.COOKIE}={signed_in.cookies[auth.COOKIE]}"}
    assert signed_in.get("/session").request.headers["Cookie"] == stolen["Cookie"]
    assert signed_in.delete("/session").status_code == 204
    assert signed_in.get("/tasks").status_code == 401
    assert signed_in.get("/tasks", headers=stolen).status_code == 401, "the session has ended, not its cookie alone"
    assert signed_in.get("/session").json() == {"keys": True, "key": None, "name": "", "scopes": [], "tasks": ""}


def test_a_session_cannot_be_used_from_other_sites(signed_in: httpx.Client) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://"}):
        refused = signed_in.post("/tasks/acme-fish/load", headers=headers)
        assert_problem(refused, 403, "foreign_origin")
    del signed_in.headers["Origin"]
    assert_problem(signed_in.post("/tasks/acme-fish/load"), 403, "foreign_origin")
    assert signed_in.post("/tasks/acme-fish/load", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert signed_in.get("/tasks", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 401
    assert signed_in.get("/tasks", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize("value", ["", "x", "====", "!!!", "a" * 4000, "lrs_x", TOKENS["acme"]])
def test_a_cookie_that_is_none_of_ours_is_nobody(api: Api, value: str) -> None:
    answer = api.http.get("/tasks", headers={"Cookie": f"{auth.COOKIE}={value}"})
    assert_problem(answer, 401, "unauthenticated")


def test_a_server_without_keys_says_that_it_needs_none(open_api: Api) -> None:
    everything = {"keys": False, "key": None, "name": "", "scopes": list(SCOPES), "tasks": ""}
    assert open_api.http.get("/session").json() == everything
    answer = open_api.http.post("/session", json={"key": "whatever"})
    assert answer.json() == everything
    assert "set-cookie" not in answer.headers
    assert open_api.http.get("/tasks", headers={"Authorization": "Bearer whatever"}).status_code == 200


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_key_sends_so_many_images_and_others_are_not_held_up(api: Api) -> None:
    """0.05 images a second are 3 in a minute."""
    ask = {"content": png(), "params": {"task": ["fish", "acme-fish"]}}
    assert api.http.post("/predict", **ask, headers={**PNG, **bearer("slow")}).status_code == 200, "two rows"
    assert api.http.post("/embed", content=png(), headers={**PNG, **bearer("slow")}).status_code == 200
    refused = api.http.post("/predict/fish", content=png(), headers={**PNG, **bearer("slow")})
    assert_problem(refused, 429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert api.http.post("/predict/fish", content=png(), headers={**PNG, **bearer("predict")}).status_code == 200


def test_a_key_starts_so_many_jobs(api: Api, tmp_path: Path) -> None:
    """What is refused is not counted, and what is sent again is counted once."""
    archive = write_zip(tmp_path / "a.zip", noise(4)).read_bytes()
    dataset = api.http.post("/datasets", content=archive, headers={**ZIP, **bearer("admin")}).json()["id"]
    ask = {"task": "fish", "dataset": dataset, "method": "linear"}
    once = {**bearer("slow"), "Idempotency-Key": "once"}
    for _ in range(2):
        unknown = {**ask, "dataset": "0" * 64}
        assert_problem(api.http.post("/train", json=unknown, headers=once), 404, "dataset_not_found")
    jobs = [api.http.post("/train", json=ask, headers=once).json()["id"] for _ in range(3)]
    assert jobs == [jobs[0]] * 3
    assert_problem(api.http.post("/train", json=ask, headers=bearer("slow")), 429, "quota_exceeded")
    assert_problem(
        api.http.post("/compare", json={"task": "fish", "dataset": dataset}, headers=bearer("slow")),
        429,
        "quota_exceeded",
    )


def test_a_key_stores_so_many_bytes_from_the_first_that_it_announces(api: Api) -> None:
    def begun(length: int) -> httpx.Response:
        return api.http.post("/uploads", headers={**bearer("small"), "Upload-Length": str(length)})

    def labelled(grey: int) -> httpx.Response:
        path = "/tasks/small-fish/feedback?label=a"
        return api.http.post(path, content=png(grey), headers={**PNG, **bearer("small")})

    half = len(png())
    assert_problem(begun(2 * half + 1), 429, "quota_exceeded")
    upload = begun(half)
    assert upload.status_code == 201
    assert labelled(1).status_code == 201
    for refused in (labelled(2), begun(1)):
        assert_problem(refused, 429, "quota_exceeded")
    assert api.http.delete(upload.headers["Location"], headers=bearer("small")).status_code == 204
    assert labelled(2).status_code == 201, "what is deleted is given back"


def test_one_tenants_unfinished_uploads_leave_room_for_others(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_store, "MAX_OF_OWNER", 2)

    def begun(name: str) -> httpx.Response:
        return api.http.post("/uploads", headers={**bearer(name), "Upload-Length": "1"})

    acme = [begun("acme") for _ in range(3)]
    assert [answer.status_code for answer in acme] == [201, 201, 429]
    assert_problem(acme[2], 429, "too_many_uploads")
    assert begun("other").status_code == 201
    api.http.delete(acme[0].headers["Location"], headers=bearer("acme"))
    assert begun("acme").status_code == 201
