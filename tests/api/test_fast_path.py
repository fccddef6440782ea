"""The fast path answers as the router does: the same request, once plain and once with a query that only FastAPI
reads, gives the same status, headers, body and count."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.middleware import fast_path
from server.api.middleware.auth import TEMPLATE
from server.api.middleware.fast_path import FastPath
from server.api.routes import predict
from server.keys.key import NOBODY
from server.observability import metrics
from server.serving.resolver import Refs
from tests.api.api_server import Api, serving
from tests.serving.floor import png, publish

PNG = {"content-type": "image/png"}
AGAINST = "?top_k=%35"  # the default, in a spelling that the fast path leaves to the router
MASKED = re.compile(r'"request_id":"[^"]*"')
VARYING = {"x-request-id", "date", "server-timing"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), request_timeout_s=10, max_body_bytes=100_000) as api:
        publish(api.floor.store)
        yield api


ASKED: list[tuple[str, bytes, dict[str, str]]] = [
    ("fish", png(), PNG),
    ("fish@live", png(), PNG),
    ("fish@live+live", png(), PNG),
    ("fish%40live", png(), PNG),
    ("fish@nothing", png(), PNG),
    ("whale", png(), PNG),
    ("Fish", png(), PNG),
    ("fi%20sh", png(), PNG),
    ("%66ish", png(), PNG),
    ("fish", b"", PNG),
    ("fish", b"no picture", PNG),
    ("fish", png()[:30], PNG),
    ("fish", bytes(200_000), PNG),
    ("fish", png(), {}),
    ("fish", png(), {"content-type": "text/plain"}),
    ("fish", png(), {"content-type": "application/x-npy"}),
    ("fish", png(), {**PNG, "lensrack-timeout": "never"}),
    ("fish", png(), {**PNG, "lensrack-timeout": "0.5"}),
    ("fish", b'{"images": []}', {"content-type": "application/json"}),
    ("fish", b"{", {"content-type": "application/json"}),
    ("fish", b"--x--", {"content-type": "multipart/form-data; boundary=x"}),
    ("fish", b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}),
    ("fish", png(), {**PNG, "host": "elsewhere.example"}),
    ("fish", png(), {**PNG, "origin": "http://elsewhere.example"}),
    ("fish", png(), {**PNG, "x-request-id": "mine"}),
]


@pytest.mark.parametrize(("task", "body", "headers"), ASKED, ids=[str(number) for number in range(len(ASKED))])
def test_it_answers_as_the_router_does(api: Api, task: str, body: bytes, headers: dict[str, str]) -> None:
    [short, long] = [api.http.post(f"/predict/{task}{query}", content=body, headers=headers) for query in ("", AGAINST)]
    assert shown(short) == shown(long)


@pytest.mark.parametrize("top_k", ["1", "2", "999"])
def test_a_top_k_is_taken_along(api: Api, top_k: str) -> None:
    asked = (f"/predict/fish?top_k={zero}{top_k}" for zero in ("", "0"))
    short, long = (api.http.post(path, content=png(), headers=PNG) for path in asked)
    assert shown(short) == shown(long)
    assert len(short.json()["predictions"][0]) == min(3, int(top_k))


def test_both_are_counted_by_the_same_route(api: Api) -> None:
    """Told by a status that no other test here leads to, as a count follows its answer at its leisure."""
    before, deadline = counted("504"), time.monotonic() + 60
    for query in ("", AGAINST):
        late = api.http.post(f"/predict/fish{query}", content=png(), headers={**PNG, "lensrack-timeout": "0.000001"})
        assert late.status_code == 504
    while counted("504") < before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted("504") == before + 2


@pytest.mark.parametrize(
    "query", [b"top_k=0", b"top_k=01", b"top_k=1000", b"top_k=5&top_k=6", b"top_k=", b"top_k=%31", b"a", b"top_k=5&"]
)
def test_what_would_have_to_be_validated_goes_to_the_router(query: bytes) -> None:
    assert asyncio.run(passed_on(scope(query_string=query)))


@pytest.mark.parametrize(
    "change", [{"method": "GET"}, {"root_path": "/under"}, {"type": "websocket"}, {"state": {TEMPLATE: "/predict"}}]
)
def test_what_is_not_plain_goes_to_the_router(change: dict[str, Any]) -> None:
    assert asyncio.run(passed_on(scope(**change)))


def test_what_is_plain_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the scope of its route is checked here, too."""
    asked: list[str] = []

    async def told(request: Any, services: Any, refs: Refs, top_k: int) -> predict.Response:
        asked.append(f"{refs[0].task} {top_k}")
        return predict.Response()

    async def required(request: Any) -> None:
        asked.append(request.scope["route"].path)

    monkeypatch.setattr(fast_path.predict, "predict", told)
    monkeypatch.setattr(fast_path.scopes, "require", required)
    assert not asyncio.run(passed_on(scope(query_string=b"top_k=7")))
    assert asked == [fast_path.TEMPLATE_SERVED, "fish 7"]


def shown(answer: httpx.Response) -> tuple[int, dict[str, str], str]:
    headers = {name: value for name, value in answer.headers.items() if name not in VARYING}
    assert answer.headers["x-request-id"]
    return answer.status_code, headers, MASKED.sub("", answer.text)


def counted(status: str) -> float:
    labels = {"route": "/predict/{task}", "method": "POST", "status": status}
    return metrics.REGISTRY.get_sample_value("lensrack_requests_total", labels) or 0.0


def scope(**changes: Any) -> dict[str, Any]:
    class App:
        class state:  # noqa: N801
            services = staticmethod(lambda key: None)

    plain = {"type": "http", "method": "POST", "path": "/predict/fish", "query_string": b"", "headers": [], "app": App}
    return {**plain, "state": {TEMPLATE: fast_path.TEMPLATE_SERVED, "key": NOBODY}, **changes}


async def passed_on(asked: dict[str, Any]) -> bool:
    reached = []

    async def router(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def nothing(message: Any = None) -> Any:
        return {"type": "http.request", "body": b""}

    await FastPath(router)(asked, nothing, nothing)
    return bool(reached)
