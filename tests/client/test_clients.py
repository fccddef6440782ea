"""What both clients do, over an injected transport and over a real socket: one suite, four times."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import re
import socket
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from math import ceil
from pathlib import Path
from typing import Any

import pytest

import lensrack
from lensrack import AsyncClient, AsyncJobHandle, Client, JobHandle, _uploads, wire
from lensrack import async_client as async_module
from lensrack import client as sync_module
from tests.client.scripted_rack import VERSION, Rack, Told, problem, serve, told, transport

PIXELS = b"\xff\xd8\xff" + b"not much of a jpeg"
Make = Callable[..., Any]


class Blocking:
    """An async client, its groups and its handles, for callers that do not await."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self.inner, self.runner = inner, runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **kwargs: self._wrap(self.runner.run(value(*args, **kwargs)))
        if inspect.isasyncgenfunction(value):
            return lambda *args, **kwargs: self._iterate(value(*args, **kwargs))
        if inspect.ismethod(value):
            return lambda *args, **kwargs: self._wrap(value(*args, **kwargs))
        return self._wrap(value)

    def _iterate(self, generator: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(generator)

        while True:
            try:
                yield self.runner.run(following())
            except StopAsyncIteration:
                return

    def _wrap(self, value: Any) -> Any:
        ours = type(value).__module__ == async_module.__name__
        return Blocking(value, self.runner) if ours else value


@pytest.fixture
def rack() -> Rack:
    return Rack()


@pytest.fixture(params=["sync-transport", "async-transport", "sync-socket", "async-socket"])
def make(request: pytest.FixtureRequest, rack: Rack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a client of one kind over one way; everything is closed at the end."""
    monkeypatch.delenv("LENSRACK_URL", raising=False)
    monkeypatch.delenv("LENSRACK_API_KEY", raising=False)
    kind, way = request.param.split("-")
    with ExitStack() as stack:
        where: dict[str, Any] = {"base_url": "http://rack"} if way == "transport" else {}
        if way == "socket":
            where["base_url"] = stack.enter_context(serve(rack))
        runner = stack.enter_context(asyncio.Runner()) if kind == "async" else None

        def build(**options: Any) -> Any:
            if way == "transport":
                options["transport"] = transport(rack)
            if runner is None:
                return stack.enter_context(Client(**{**where, **options}))
            client = Blocking(AsyncClient(**{**where, **options}), runner)
            stack.callback(client.close)
            return client

        yield build


@pytest.fixture
def socket_only(request: pytest.FixtureRequest) -> None:
    if "transport" in request.node.name:
        pytest.skip("httpx.MockTransport reads a body whole before it answers")


class TestPredictions:
    def test_one_image_travels_as_it_is(self, make: Make, rack: Rack) -> None:
        answer = make().predict("trash", PIXELS, top_k=2)
        assert (answer.best.label, answer.label, answer.version, len(answer.predictions)) == (
            "glass",
            "glass",
            VERSION,
            2,
        )
        [asked] = rack.asked
        assert (asked.method, asked.path, asked.params) == ("POST", "/predict/trash", {"top_k": "2"})
        assert (asked.body, asked.headers["content-type"]) == (PIXELS, "image/jpeg")

    def test_several_images_travel_in_one_request(self, make: Make, rack: Rack) -> None:
        answers = make().predict("trash@live", [PIXELS, PIXELS, PIXELS])
        assert [answer.label for answer in answers] == ["glass"] * 3
        [asked] = rack.asked
        assert asked.path == "/predict/trash@live"
        assert asked.headers["content-type"].startswith("multipart/form-data")
        assert asked.body.count(PIXELS) == 3

    def test_a_list_of_one_answers_with_a_list_of_one(self, make: Make) -> None:
        assert len(make().predict("trash", [PIXELS])) == 1

    def test_many_tasks(self, make: Make, rack: Rack) -> None:
        many = make().predict_many(["trash", "nothing", "signs"], PIXELS, top_k=1, key="visitor-7")
        assert many["trash"].label == "glass"
        assert set(many.answers) == {"trash", "signs"}
        with pytest.raises(lensrack.NotFoundError, match="no task 'nothing'"):
            many["nothing"]
        [asked] = rack.asked
        assert asked.query == [("task", "trash"), ("task", "nothing"), ("task", "signs"), ("top_k", "1")]
        assert asked.headers["lensrack-key"] == "visitor-7"

    def test_embed(self, make: Make) -> None:
        client = make()
        assert client.embed(PIXELS) == [0.5, 1.5]
        assert client.embed([PIXELS, PIXELS]) == [[0.5, 1.5], [0.5, 1.5]]

    def test_an_answer_for_another_number_of_images_is_refused(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/predict/trash", told({"task": "trash", "version": VERSION, "predictions": []}))
        with pytest.raises(lensrack.ProtocolError, match="expected answers for 1 images, got 0"):
            make().predict("trash", PIXELS)


class TestMany:
    """`map`: requests in flight, answers in order."""

    def images(self, count: int) -> list[bytes]:
        return [PIXELS + bytes([number]) for number in range(count)]

    def test_answers_come_in_order_whatever_order_they_are_ready_in(self, make: Make, rack: Rack) -> None:
        def answer(asked: Any) -> Told:
            number = asked.body[-1]
            label = {"label": str(number), "index": 0, "score": 1.0}
            slow = 0.1 if number % 3 == 0 else 0.0
            body = told({"task": "trash", "version": VERSION, "predictions": [[label]]})
            return replace(body, delay_s=slow)

        rack.answer = answer  # type: ignore[method-assign]
        answers = make().map("trash", iter(self.images(10)), in_flight=4)
        assert [one.label for one in answers] == [str(number) for number in range(10)]

    def test_images_are_taken_as_they_are_needed(self, make: Make, rack: Rack) -> None:
        taken: list[int] = []

        def images() -> Iterator[bytes]:
            for number, image in enumerate(self.images(20)):
                taken.append(number)
                yield image

        answers = make().map("trash", images(), in_flight=3)
        assert not taken
        next(answers)
        assert len(taken) == 3
        next(answers)
        assert len(taken) == 4

    def test_a_failure_is_raised_or_takes_its_images_place(self, make: Make, rack: Rack) -> None:
        client, refusal = make(), problem(400, "bad_image")
        rack.misbehave("/predict/trash", refusal)
        told = list(client.map("trash", self.images(4), in_flight=1, errors="return"))
        assert [isinstance(one, lensrack.BadRequestError) for one in told] == [True, False, False, False]
        rack.misbehave("/predict/trash", refusal)
        with pytest.raises(lensrack.BadRequestError):
            list(client.map("trash", self.images(4), in_flight=1))

    @pytest.mark.parametrize("wrong", [{"images": "a.png"}, {"images": b"a"}, {"in_flight": 0}, {"errors": "ignore"}])
    def test_wrong_wishes(self, make: Make, rack: Rack, wrong: dict[str, Any]) -> None:
        with pytest.raises(lensrack.InvalidInput):
            list(make().map("trash", **{"images": [PIXELS], **wrong}))
        assert not rack.asked


class TestHabits:
    def test_options_hold_for_the_copy_only(self, make: Make, rack: Rack) -> None:
        client = make(max_retries=0)
        patient = client.with_options(max_retries=3)
        rack.misbehave("/tasks", *[problem(503, "busy", **{"Retry-After": "0"})] * 3)
        assert len(patient.tasks.list()) == 2
        assert len(rack.asked) == 4
        rack.misbehave("/tasks", problem(503, "busy"))
        with pytest.raises(lensrack.UnavailableError):
            client.tasks.list()

    def test_a_timeout_of_its_own(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/healthz", Told(200, b"{}", delay_s=3))
        with pytest.raises(lensrack.RequestTimeout, match=r"within 0\.2 s"):
            make(max_retries=0).with_options(timeout=0.2).health()

    def test_wrong_options(self, make: Make) -> None:
        for wrong in ({"timeout": 0}, {"max_retries": -1}):
            with pytest.raises(lensrack.InvalidInput, match="expected timeout > 0 and max_retries >= 0"):
                make().with_options(**wrong)

    def test_options_from_the_environment(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LENSRACK_TIMEOUT", "7.5")
        monkeypatch.setenv("LENSRACK_RETRIES", "5")
        outside = make()._config
        assert (outside.timeout_s, outside.max_retries) == (7.5, 5)
        inside = make(timeout=3, max_retries=0)._config
        assert (inside.timeout_s, inside.max_retries) == (3, 0)
        monkeypatch.setenv("LENSRACK_TIMEOUT", "soon")
        with pytest.raises(lensrack.InvalidInput, match="LENSRACK_TIMEOUT: expected a number, got 'soon'"):
            make()

    def test_the_http_behind_a_value(self, make: Make, rack: Rack) -> None:
        headers = {"X-Request-Id": "r-7", "Server-Timing": "decode;dur=1.500, queue;dur=0.250, compute;dur=20.000"}
        rack.misbehave("/healthz", told({"status": "ok", "version": "9"}, **headers))
        client = make()
        raw = client.raw_response(lambda c: c.health())
        assert (raw.value.version, raw.status, raw.request_id) == ("9", 200, "r-7")
        assert raw.timings_s == pytest.approx({"decode": 0.0015, "queue": 0.00025, "compute": 0.02})
        assert b'"status": "ok"' in raw.content
        assert raw.headers["Content-Type"] == "application/json"
        pages = client.raw_response(lambda c: c.tasks.get("trash"))
        assert (pages.value.task, len(pages.replies)) == ("trash", 1)

    def test_a_refusal_is_still_raised(self, make: Make) -> None:
        client = make()
        with pytest.raises(lensrack.NotFoundError):
            client.raw_response(lambda c: c.jobs.get("j9"))

    def test_an_image_is_never_fetched(self, make: Make, rack: Rack) -> None:
        with pytest.raises(lensrack.InvalidInput, match=r"never fetched from a URL, got 'https://x/y\.png'"):
            make().predict("trash", "https://x/y.png")
        assert not rack.asked


class TestTasks:
    def test_reading(self, make: Make) -> None:
        tasks = make().tasks
        assert [task.task for task in tasks.list()] == ["signs", "trash"]
        assert tasks.get("trash").live == VERSION
        assert tasks.versions("trash")[0].version == VERSION
        assert tasks.version("trash", VERSION[:8]).method == "vpt_deep"
        assert tasks.alias("trash").targets[0].version == VERSION
        assert tasks.history("trash")[0].alias == "live"

    def test_deleting(self, make: Make, rack: Rack) -> None:
        tasks = make().tasks
        assert tasks.delete("signs") is None
        assert "signs" not in rack.tasks
        tasks.delete_version("trash", VERSION)
        tasks.delete_alias("trash", "canary")
        assert [asked.path for asked in rack.asked[1:]] == [
            f"/tasks/trash/versions/{VERSION}",
            "/tasks/trash/aliases/canary",
        ]

    def test_bundles_travel_whole(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        tasks = make().tasks
        data = tasks.download("trash", VERSION)
        assert data == b"a bundle"
        (tmp_path / "bundle").write_bytes(data)
        for source in (data, tmp_path / "bundle", str(tmp_path / "bundle"), io.BytesIO(data)):
            assert tasks.upload("trash", source, alias="live").version == VERSION
        [first, *_] = rack.to("/tasks/trash/versions")
        assert (first.method, first.params, first.headers["content-type"]) == (
            "PUT",
            {"alias": "live"},
            "application/octet-stream",
        )

    def test_a_bundle_that_arrives_damaged_is_refused(self, make: Make, rack: Rack) -> None:
        rack.misbehave(f"/tasks/trash/versions/{VERSION}/bundle", Told(200, b"another bundle"))
        with pytest.raises(lensrack.ProtocolError, match="expected digest"):
            make().tasks.download("trash", VERSION)

    def test_aliases_move_under_a_condition(self, make: Make, rack: Rack) -> None:
        tasks = make().tasks
        before = tasks.alias("trash", "live")
        after = tasks.set_alias("trash", "live", VERSION, weight=0.1, if_match=before.etag)
        assert after.revision == before.revision + 1
        assert rack.asked[-1].json() == {"version": VERSION, "weight": 0.1}
        with pytest.raises(lensrack.PreconditionFailedError):
            tasks.set_alias("trash", "live", VERSION, if_match=before.etag)
        assert tasks.rollback("trash").revision == after.revision + 1

    def test_feedback(self, make: Make, rack: Rack) -> None:
        client = make()
        said = client.feedback("trash", PIXELS, "glass")
        assert [(item.label, item.previous) for item in said.items] == [("glass", "metal")]
        assert (rack.asked[0].path, rack.asked[0].params) == ("/tasks/trash/feedback", {"label": "glass"})
        assert (rack.asked[0].body, rack.asked[0].headers["content-type"]) == (PIXELS, "image/jpeg")
        assert len(client.feedback("trash", [PIXELS, PIXELS], "tin", new_label=True).items) == 2
        assert rack.asked[1].params == {"label": "tin", "new_label": "true"}
        page = client.tasks.feedback("trash", cursor="9", limit=3, label="glass")
        assert (page.labels, page.next) == ({"glass": 1}, "7")
        assert rack.asked[2].params == {"cursor": "9", "limit": "3", "label": "glass"}
        client.tasks.delete_feedback("trash", "ab" * 32)
        assert (rack.asked[3].method, rack.asked[3].path) == ("DELETE", f"/tasks/trash/feedback/{'ab' * 32}")
        assert client.tasks.freeze_feedback("trash").parent == "d0"
        assert client.tasks.freeze_feedback("trash", name="better", parent="d1").name == "better"
        assert rack.asked[5].params == {"name": "better", "parent": "d1"}

    def test_all_feedback_page_by_page(self, make: Make, rack: Rack) -> None:
        item = {"sha256": "ab" * 32, "label": "glass", "bytes": 9, "width": 3, "height": 2, "at": 1.0}
        page = {"task": "trash", "images": 2, "labels": {"glass": 2}, "items": [item]}
        rack.misbehave("/tasks/trash/feedback", told({**page, "next": "7"}), told(page))
        labels = [item.label for item in make().tasks.iterate_feedback("trash", label="glass")]
        assert labels == ["glass", "glass"]
        first = {"limit": "500", "label": "glass"}
        assert [asked.params for asked in rack.asked] == [first, {**first, "cursor": "7"}]

    def test_residency(self, make: Make) -> None:
        tasks = make().tasks
        assert tasks.load("trash").resident
        assert not tasks.unload("trash@live").resident
        assert tasks.pin("trash").pinned
        assert not tasks.pin("trash", pinned=False).pinned

    @pytest.mark.parametrize("name", ["", ".", ".."])
    def test_no_name_becomes_another_request(self, make: Make, rack: Rack, name: str) -> None:
        with pytest.raises(lensrack.InvalidInput, match="version: expected a name"):
            make().tasks.delete_version("trash", name)
        assert not rack.asked

    def test_names_are_quoted(self, make: Make, rack: Rack) -> None:
        with pytest.raises(lensrack.NotFoundError):
            make().tasks.delete("../x?y#z")
        assert rack.asked[0].path == "/tasks/../x?y#z"


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, lensrack.BadRequestError),
            (401, lensrack.AuthenticationError),
            (403, lensrack.AuthenticationError),
            (404, lensrack.NotFoundError),
            (409, lensrack.ConflictError),
            (412, lensrack.PreconditionFailedError),
            (413, lensrack.TooLargeError),
            (415, lensrack.UnsupportedMediaError),
            (422, lensrack.BadRequestError),
            (429, lensrack.RateLimitedError),
            (500, lensrack.ServerError),
            (503, lensrack.UnavailableError),
            (504, lensrack.DeadlineError),
            (507, lensrack.ServerError),
            (418, lensrack.ApiError),
        ],
    )
    def test_a_problem_becomes_its_error(self, make: Make, rack: Rack, status: int, kind: type[Exception]) -> None:
        rack.misbehave("/tasks", problem(status, "some_code", "what went wrong"))
        with pytest.raises(lensrack.ApiError) as caught:
            make(max_retries=0).tasks.list()
        error = caught.value
        assert type(error) is kind
        assert (error.status, error.code, error.detail) == (status, "some_code", "what went wrong")
        assert error.request_id == "request-1"
        assert str(error) == f"what went wrong (some_code, HTTP {status})"

    def test_a_proxy_page_becomes_an_error_too(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", Told(502, b"<html>bad gateway</html>", {"X-Request-Id": "from-proxy"}))
        with pytest.raises(lensrack.ServerError) as caught:
            make(max_retries=0).tasks.list()
        assert (caught.value.code, caught.value.request_id) == ("http_502", "from-proxy")

    @pytest.mark.parametrize(
        "body", [b"{", b"<html>", b"", b'{"tasks": 1}', b'{"tasks": [{}]}', b"[" * 3000, b"\xff\xfe"]
    )
    def test_an_answer_that_is_no_message(self, make: Make, rack: Rack, body: bytes) -> None:
        rack.misbehave("/tasks", Told(200, body))
        with pytest.raises(lensrack.ProtocolError, match="GET /tasks: the answer is not a TaskList"):
            make().tasks.list()
        assert len(rack.asked) == 1

    def test_a_redirect_is_not_followed(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", Told(307, b"", {"Location": "http://elsewhere/tasks"}))
        with pytest.raises(lensrack.ProtocolError, match="redirected"):
            make(api_key="secret").tasks.list()

    def test_not_ready_is_an_answer(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/readyz", told({"ready": False, "checks": {"store": "away"}}, 503))
        assert make().ready().checks == {"store": "away"}
        assert len(rack.asked) == 1
        assert make().health().version == "9.9.9"


class TestRetries:
    def test_retry_after_is_waited_for(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/predict/trash", problem(429, "queue_full", **{"Retry-After": "1"}))
        assert make().predict("trash", PIXELS).label == "glass"
        first, second = rack.asked
        assert 1.0 <= second.at - first.at < 3.0
        assert first.body == second.body == PIXELS

    def test_a_date_is_waited_for(self, make: Make, rack: Rack) -> None:
        moment = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        rack.misbehave("/tasks", problem(503, "shutting_down", **{"Retry-After": moment}))
        make().tasks.list()
        assert rack.asked[1].at - rack.asked[0].at > 0.9  # an HTTP date has whole seconds

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_given_up_after_max_retries(self, make: Make, rack: Rack, status: int) -> None:
        rack.misbehave("/tasks", *[problem(status, "busy", **{"Retry-After": "0"})] * 5)
        with pytest.raises(lensrack.ApiError) as caught:
            make(max_retries=2).tasks.list()
        assert (len(rack.asked), caught.value.status, caught.value.retry_after_s) == (3, status, 0)

    @pytest.mark.parametrize("status", [400, 404, 409, 413, 500])
    def test_what_would_not_change_is_not_sent_again(self, make: Make, rack: Rack, status: int) -> None:
        rack.misbehave("/predict/trash", problem(status, "no"))
        with pytest.raises(lensrack.ApiError):
            make().predict("trash", PIXELS)
        assert len(rack.asked) == 1

    def test_a_rollback_is_sent_once(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks/trash/rollback", problem(503, "busy"), Told(200, b"{", drop=True))
        with pytest.raises(lensrack.UnavailableError):
            make().tasks.rollback("trash")
        with pytest.raises(lensrack.ConnectError):
            make().tasks.rollback("trash")
        assert len(rack.asked) == 2

    def test_no_wait_that_cannot_end_in_time(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", problem(429, "queue_full", **{"Retry-After": "30"}))
        started = time.monotonic()
        with pytest.raises(lensrack.RateLimitedError) as caught:
            make(timeout=5).tasks.list()
        assert time.monotonic() - started < 2
        assert caught.value.retry_after_s == 30

    def test_a_connection_dropped_in_an_answer_is_taken_up_again(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", Told(200, b'{"tasks": [', drop=True))
        assert len(make().tasks.list()) == 2
        assert len(rack.asked) == 2

    def test_a_connection_that_always_breaks(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", *[Told(200, b'{"tasks": [', drop=True)] * 3)
        with pytest.raises(lensrack.ConnectError, match="GET /tasks: the connection broke"):
            make(max_retries=1).tasks.list()
        assert len(rack.asked) == 2

    def test_a_lost_answer_to_a_delete(self, make: Make, rack: Rack) -> None:
        """The first DELETE worked, its answer was lost; the second finds nothing, which is what was wanted."""
        rack.misbehave("/tasks/trash", Told(200, b"", drop=True), problem(404, "task_not_found"))
        make().tasks.delete("trash")
        with pytest.raises(lensrack.NotFoundError):
            make().tasks.delete("no-such-task")

    def test_a_retried_train_request_has_the_same_key(self, make: Make, rack: Rack) -> None:
        client = make()
        rack.misbehave("/train", problem(503, "busy", **{"Retry-After": "0"}), Told(202, b"{", drop=True))
        client.train("trash", "d1", "linear", {"epochs": 2})
        keys = [asked.headers["idempotency-key"] for asked in rack.asked]
        assert len(keys) == 3
        assert len(set(keys)) == 1
        client.train("trash", "d1")
        assert rack.asked[-1].headers["idempotency-key"] != keys[0]
        client.train("trash", "d1", idempotency_key="mine")
        assert rack.asked[-1].headers["idempotency-key"] == "mine"

    def test_condensing_is_a_job_that_begins_with_a_version(self, make: Make, rack: Rack) -> None:
        make().condense("trash", keep=[0.1, 0.3], epsilon=0.01, publish="never", idempotency_key="mine")
        asked = rack.asked[-1]
        assert asked.json() == {
            "task": "trash",
            "method": "auto",
            "recipe": {"condense": {"version": "live", "keep": [0.1, 0.3], "epsilon": 0.01}},
            "publish": "never",
            "priority": 0,
        }
        assert asked.headers["idempotency-key"] == "mine"
        make().condense("trash", VERSION, dataset="d1", epochs=3)
        assert rack.asked[-1].json()["dataset"] == "d1"
        with pytest.raises(lensrack.InvalidInput, match="epsilon"):
            make().condense("trash", epsilon=3.0)

    def test_timeout(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", *[Told(200, b'{"tasks": []}', delay_s=1.5)] * 3)
        started = time.monotonic()
        with pytest.raises(lensrack.RequestTimeout, match=r"no complete answer within 0\.4 s") as caught:
            make(timeout=0.4).tasks.list()
        assert time.monotonic() - started < 1.2
        assert isinstance(caught.value, TimeoutError)

    def test_an_answer_that_drips_does_not_outlive_the_timeout(self, make: Make, rack: Rack) -> None:
        """Every byte comes in time for a read, all of them together do not."""
        rack.misbehave("/tasks", Told(200, b'{"tasks":' + b" " * 30 + b"[]}", drip_s=0.1))
        started = time.monotonic()
        with pytest.raises(lensrack.RequestTimeout):
            make(timeout=0.5).tasks.list()
        assert time.monotonic() - started < 2


class TestDatasets:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        root = tmp_path / "bottles"
        for label, count in (("glass", 2), ("metal", 1)):
            (root / label).mkdir(parents=True)
            for index in range(count):
                (root / label / f"{index}.jpg").write_bytes(PIXELS + bytes([index]))
        (root / ".hidden").write_text("not for anyone")
        (root / "glass" / ".DS_Store").write_text("neither")
        (root / "metal" / "link.jpg").symlink_to(root / "glass" / "0.jpg")
        (root / "looped").symlink_to(root)
        return root

    def test_a_folder_is_packed(self, make: Make, rack: Rack, folder: Path) -> None:
        seen: list[tuple[int, int | None]] = []
        dataset = make().datasets.upload(folder, progress=lambda sent, total: seen.append((sent, total)))
        [asked] = rack.asked
        assert (asked.params, asked.headers["content-type"]) == ({"name": "bottles"}, "application/zip")
        with zipfile.ZipFile(io.BytesIO(asked.body)) as archive:
            assert archive.namelist() == ["glass/0.jpg", "glass/1.jpg", "metal/0.jpg"]
            assert archive.read("glass/1.jpg") == PIXELS + b"\x01"
            assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert [file.name for file in dataset.skipped] == ["looped", "metal/link.jpg", "glass/broken.jpg"]
        assert seen[0] == (0, len(asked.body))
        assert seen[-1] == (len(asked.body), len(asked.body))

    def test_the_same_folder_gives_the_same_bytes(self, make: Make, rack: Rack, folder: Path) -> None:
        make().datasets.upload(folder, name="first")
        os.utime(folder / "glass" / "0.jpg", (1, 1))
        make().datasets.upload(str(folder), name="second")
        assert rack.asked[0].body == rack.asked[1].body
        assert rack.asked[1].params == {"name": "second"}

    def test_archives_travel_as_they_are(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        client = make()
        archives = {
            "a.zip": (b"PK\x03\x04 and more", "application/zip"),
            "a.tar.gz": (b"\x1f\x8b and more", "application/gzip"),
            "a.parquet": (b"PAR1 and more", "application/vnd.apache.parquet"),
            "a.npz": (b"PK\x03\x04 and more", "application/zip"),
            "a.tar.zst": (b"\x28\xb5\x2f\xfd and more", "application/zstd"),
            "a.tar": (bytes(257) + b"ustar" + bytes(250), "application/x-tar"),
        }
        for name, (data, kind) in archives.items():
            (tmp_path / name).write_bytes(data)
            client.datasets.upload(tmp_path / name)
            asked = rack.asked[-1]
            assert (asked.body, asked.headers["content-type"], asked.params) == (data, kind, {"name": "a"})

    def test_a_retry_starts_from_the_beginning(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/datasets", problem(503, "busy", **{"Retry-After": "0"}))
        file = io.BytesIO(b"skipped" + b"PK\x03\x04 and more")
        file.seek(7)
        make().datasets.upload(file)
        assert [asked.body for asked in rack.asked] == [b"PK\x03\x04 and more"] * 2

    def test_a_pipe_is_sent_once(self, make: Make, rack: Rack) -> None:
        data = b"PK\x03\x04" + os.urandom(600_000)
        rack.misbehave("/datasets", problem(503, "busy", **{"Retry-After": "0"}))
        for outcome in (lensrack.UnavailableError, None):
            reading, writing = os.pipe()
            writer = threading.Thread(target=_fill, args=(writing, data))
            writer.start()
            with open(reading, "rb") as pipe:
                if outcome:
                    with pytest.raises(outcome):
                        make().datasets.upload(pipe)
                else:
                    make().datasets.upload(pipe, name="from a pipe")
            writer.join()
        assert len(rack.asked) == 2
        assert (rack.asked[1].body, rack.asked[1].headers["transfer-encoding"]) == (data, "chunked")

    @pytest.mark.usefixtures("socket_only")
    def test_memory_stays_bounded(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        size = 48 * 2**20
        with (tmp_path / "large.zip").open("wb") as file:
            file.write(b"PK\x03\x04")
            file.truncate(size)
        client = make()
        client.datasets.list()  # the connection and the models are there
        tracemalloc.start()
        client.datasets.upload(tmp_path / "large.zip")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(asked.body_bytes for asked in rack.asked if asked.method == "PATCH") == size
        assert peak < 6 * 2**20

    @pytest.mark.usefixtures("socket_only")
    def test_a_file_that_shrinks_is_told(self, make: Make, tmp_path: Path) -> None:
        path = tmp_path / "large.zip"
        path.write_bytes(b"PK\x03\x04" + bytes(2**20))

        def cut(sent: int, total: int | None) -> None:
            os.truncate(path, 300_000)

        with pytest.raises(lensrack.InvalidInput, match="shrank while it was sent: expected 1048580 bytes, got"):
            make().datasets.upload(path, progress=cut)

    def test_what_is_no_dataset(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        client = make()
        (tmp_path / "notes.txt").write_text("no archive")
        (tmp_path / "empty" / "glass").mkdir(parents=True)
        for path, why in (
            ("notes.txt", "notes.txt is not an archive: expected a folder"),
            ("empty", "holds no files: expected a folder of class folders"),
            ("missing", "No such file"),
        ):
            with pytest.raises(lensrack.InvalidInput, match=why):
                client.datasets.upload(tmp_path / path)
        assert not rack.asked

    def test_more_for_a_dataset(self, make: Make, rack: Rack, folder: Path) -> None:
        assert make().datasets.add(folder, "d1").parent == "d1"
        assert rack.asked[-1].params == {"parent": "d1"}
        make().datasets.add(folder, "d1", name="more")
        assert rack.asked[-1].params == {"parent": "d1", "name": "more"}

    def test_the_rest(self, make: Make, rack: Rack) -> None:
        datasets = make().datasets
        assert [dataset.id for dataset in datasets.list()] == ["d1"]
        assert datasets.get("d1").labels == ["glass", "metal"]
        datasets.delete("d1")
        assert (rack.asked[-1].method, rack.asked[-1].path) == ("DELETE", "/datasets/d1")


class TestUploadsInPieces:
    DATA = b"PK\x03\x04" + bytes(range(256)) * 400  # a good hundred kB

    @pytest.fixture(autouse=True)
    def _small_and_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_uploads, "PIECE_BYTES", 30_000)
        monkeypatch.setattr(_uploads, "PAUSE_S", 0.01)

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "large.zip"
        path.write_bytes(self.DATA)
        return path

    def test_all_of_them_arrive_in_order(self, make: Make, rack: Rack, file: Path) -> None:
        seen: list[tuple[int, int | None]] = []
        begun: list[str] = []
        dataset = make().datasets.upload(
            file, progress=lambda sent, total: seen.append((sent, total)), on_upload=begun.append
        )
        assert (dataset.id, begun) == ("d1", ["u1"])
        assert rack.uploads["u1"].body == self.DATA
        assert [asked.headers["upload-offset"] for asked in rack.to("/uploads/u1")] == ["0", "30000", "60000", "90000"]
        assert {asked.headers["tus-resumable"] for asked in rack.to("/uploads/u1")} == {"1.0.0"}
        assert rack.asked[-1].params == {"upload": "u1", "name": "large"}
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == ((0, len(self.DATA)), (len(self.DATA), len(self.DATA)))

    def test_a_broken_line_goes_on_where_the_server_stands(self, make: Make, rack: Rack, file: Path) -> None:
        breaks = {
            30_000: Told(200, b"", drop=True),
            60_000: problem(503, "shutting_down", **{"Retry-After": "0"}),
            90_000: problem(409, "upload_busy"),
        }

        told: list[int] = []

        def at(sent: int, total: int | None) -> None:
            told.append(sent)
            if sent in breaks and told[-2:] == [sent, sent]:  # sent, and acknowledged
                rack.misbehave("/uploads/u1", breaks.pop(sent))

        make(max_retries=0).datasets.upload(file, progress=at)
        assert not breaks
        assert rack.uploads["u1"].body == self.DATA
        assert [asked.method for asked in rack.to("/uploads/u1")].count("HEAD") == 3
        assert len(rack.to("/uploads")) == len(rack.to("/datasets")) == 1

    def test_a_piece_that_came_although_its_answer_did_not_is_not_sent_again(
        self, make: Make, rack: Rack, file: Path
    ) -> None:
        told: list[int] = []

        def at(sent: int, total: int | None) -> None:
            told.append(sent)
            if told.count(30_000) == 2:  # sent, and acknowledged
                rack.uploads["u1"].offset, rack.uploads["u1"].body = 45_000, self.DATA[:45_000]
                told.append(30_000)

        make().datasets.upload(file, progress=at)
        assert rack.uploads["u1"].body == self.DATA
        assert [asked.method for asked in rack.to("/uploads/u1")] == ["PATCH", "PATCH", "HEAD", "PATCH", "PATCH"]

    def test_a_line_that_stays_broken_is_given_up_and_can_be_taken_up_again(
        self, make: Make, rack: Rack, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_uploads, "OUTAGE_S", 0.05)
        begun: list[str] = []

        def at(sent: int, total: int | None) -> None:
            if sent == 60_000:
                rack.misbehave("/uploads/u1", *[problem(503, "shutting_down", **{"Retry-After": "0"})] * 500)

        with pytest.raises(lensrack.UnavailableError):
            make(max_retries=0).datasets.upload(file, progress=at, on_upload=begun.append)
        rack.behave()
        asked, left = len(rack.asked), len(self.DATA) - rack.uploads["u1"].offset
        assert 0 < left < len(self.DATA)
        assert make().datasets.upload(file, resume=begun[0]).id == "d1"
        assert rack.uploads["u1"].body == self.DATA
        assert [one.method for one in rack.asked[asked:]] == ["HEAD", *["PATCH"] * ceil(left / 30_000), "POST"]

    def test_another_file_does_not_go_on_with_an_upload(self, make: Make, rack: Rack, file: Path) -> None:
        make().datasets.upload(file)
        client = make()
        for other in (self.DATA + b"!", self.DATA[:-1] + b"!"):
            file.write_bytes(other)
            with pytest.raises(lensrack.InvalidInput, match="is of another file"):
                client.datasets.upload(file, resume="u1")
        with pytest.raises(lensrack.NotFoundError):
            client.datasets.upload(file, resume="u7")
        reading, writing = os.pipe()
        writer = threading.Thread(target=_fill, args=(writing, self.DATA))
        writer.start()
        with open(reading, "rb") as pipe:
            with pytest.raises(lensrack.InvalidInput, match="a pipe cannot start in its middle"):
                client.datasets.upload(pipe, resume="u1")
            pipe.read()
        writer.join()

    def test_what_cannot_get_better_is_told_at_once(self, make: Make, rack: Rack, file: Path) -> None:
        rack.misbehave("/uploads/u1", problem(507, "disk_full"))
        with pytest.raises(lensrack.ServerError, match="disk_full"):
            make().datasets.upload(file)
        rack.misbehave("/uploads", problem(413, "body_too_large"))
        with pytest.raises(lensrack.TooLargeError):
            make().datasets.upload(file)
        assert [asked.method for asked in rack.asked] == ["POST", "PATCH", "POST"]

    def test_the_last_answer_may_be_lost_too(self, make: Make, rack: Rack, file: Path) -> None:
        rack.misbehave("/datasets", *[Told(201, b"{", drop=True)] * 3)
        assert make(max_retries=1).datasets.add(file, "d1").parent == "d1"
        assert [asked.params for asked in rack.to("/datasets")] == [{"upload": "u1", "parent": "d1"}] * 4
        assert rack.uploads["u1"].body == self.DATA


class TestJobs:
    def test_training_to_the_end(self, make: Make, rack: Rack) -> None:
        wishes = {"publish": "if_better", "priority": 3}
        handle = make().train("trash", "d1", method="linear", recipe={"epochs": 2, "lr": 0.5}, **wishes)
        assert handle.state == "queued"
        assert rack.asked[0].json() == {
            "task": "trash",
            "dataset": "d1",
            "method": "linear",
            "recipe": {"epochs": 2, "lr": 0.5},
            **wishes,
        }
        job = handle.wait(timeout=10)
        assert (job.state, job.version, handle.state) == ("succeeded", VERSION, "succeeded")

    def test_comparing_to_the_table(self, make: Make, rack: Rack) -> None:
        client = make()
        rack.misbehave("/compare", problem(503, "busy", **{"Retry-After": "0"}))
        handle = client.compare("trash", "d1", ["linear", "vpt_deep", "full"], seeds=[4, 5], recipe={"epochs": 2})
        assert rack.asked[-1].json() == {
            "task": "trash",
            "dataset": "d1",
            "methods": ["linear", "vpt_deep", "full"],
            "seeds": [4, 5],
            "recipe": {"epochs": 2},
            "priority": 0,
        }
        assert len({asked.headers["idempotency-key"] for asked in rack.to("/compare")}) == 1
        assert client.comparison(handle.id).rows == []
        handle.wait(timeout=10)
        found = client.comparison(handle.id)
        assert [row.method for row in found.rows] == ["linear", "vpt_deep", "full"]
        assert [row.servable for row in found.rows] == [True, True, False]

    @pytest.mark.parametrize(
        "wrong", [{"methods": "linear"}, {"methods": []}, {"seeds": [1, 1]}, {"recipe": {"lr": 1.0}}]
    )
    def test_a_wrong_comparison_is_not_sent(self, make: Make, rack: Rack, wrong: dict[str, Any]) -> None:
        with pytest.raises(lensrack.InvalidInput):
            make().compare("trash", "d1", **wrong)
        assert not rack.asked

    def test_events_come_once_each_up_to_the_last(self, make: Make, rack: Rack) -> None:
        rack.job_plan = ("succeeded", 5)
        handle = make().train("trash", "d1")
        events = list(handle.events())
        assert [event.seq for event in events] == list(range(1, 9))
        assert events[-1].type == "succeeded"
        assert [event.seq for event in handle.events(after=6)] == [7, 8]
        assert list(handle.events(after=8, timeout=5)) == []

    def test_events_survive_a_dropped_connection(self, make: Make, rack: Rack) -> None:
        client = make(max_retries=0)
        handle = client.train("trash", "d1")
        stream = handle.events()
        seen = [next(stream).seq, next(stream).seq]
        rack.misbehave("/train/j1/events", Told(200, b'{"events": [', drop=True), problem(503, "shutting_down"))
        seen += [event.seq for event in stream]
        assert seen == [1, 2, 3, 4, 5]
        assert len(rack.to("/train/j1/events")) == 5

    def test_a_server_that_does_not_wait_is_not_asked_in_a_tight_loop(self, make: Make, rack: Rack) -> None:
        rack.job_plan = ("running", 1)
        handle = make().train("trash", "d1")
        with pytest.raises(lensrack.RequestTimeout, match=r"has not finished within 1\.5 s; it goes on"):
            handle.wait(timeout=1.5)
        assert len(rack.to("/train/j1/events")) < 8

    def test_a_wait_ends_although_the_server_hangs(self, make: Make, rack: Rack) -> None:
        handle = make().train("trash", "d1")
        rack.misbehave("/train/j1/events", *[Told(200, b"{}", delay_s=4)] * 3)
        started = time.monotonic()
        with pytest.raises(lensrack.RequestTimeout, match="has not finished within"):
            handle.wait(timeout=0.3)
        assert time.monotonic() - started < 3

    def test_a_job_that_fails(self, make: Make, rack: Rack) -> None:
        rack.job_plan = ("failed", 1)
        with pytest.raises(lensrack.JobFailed, match=r"job j1 failed: one class only \(bad_dataset\)") as caught:
            make().train("trash", "d1").wait()
        assert caught.value.job.state == "failed"

    def test_cancelling(self, make: Make) -> None:
        client = make()
        handle = client.train("trash", "d1")
        assert handle.cancel().state == "cancelled"
        assert handle.refresh().cancel_requested
        assert client.jobs.handle("j1").id == "j1"
        assert client.jobs.cancel("j1").finished

    def test_pages_of_jobs(self, make: Make, rack: Rack) -> None:
        client = make()
        for task in ("trash", "signs", "trash", "trash", "trash"):
            client.train(task, "d1")
        first = client.jobs.list(limit=2)
        assert ([job.id for job in first.jobs], first.next) == (["j1", "j2"], "2")
        assert [job.id for job in client.jobs.list(cursor=first.next, limit=2).jobs] == ["j3", "j4"]
        assert [job.id for job in client.jobs.iterate(task="trash")] == ["j1", "j3", "j4", "j5"]
        client.jobs.list(state="failed")
        assert rack.asked[-1].params == {"limit": "50", "state": "failed"}

    def test_a_page_of_events(self, make: Make, rack: Rack) -> None:
        client = make()
        client.train("trash", "d1")
        page = client.jobs.events("j1", after=1, wait_s=2)
        assert ([event.seq for event in page.events], page.next, page.finished) == ([2, 3], 3, False)
        assert rack.asked[-1].params == {"after": "1", "wait_s": "2"}

    @pytest.mark.parametrize("recipe", [{"epochs": 0}, {"no_such_setting": 1}])
    def test_a_wrong_recipe_is_not_sent(self, make: Make, rack: Rack, recipe: dict[str, Any]) -> None:
        with pytest.raises(lensrack.InvalidInput, match=next(iter(recipe))):
            make().train("trash", "d1", recipe=recipe)
        assert not rack.asked


class TestConfiguration:
    def test_the_key_travels_and_is_not_shown(self, make: Make, rack: Rack) -> None:
        client = make(api_key="secret")
        client.health()
        assert rack.asked[0].headers["authorization"] == "Bearer secret"
        assert re.fullmatch(r"lensrack/\S+", rack.asked[0].headers["user-agent"])
        assert "secret" not in repr(client._config)

    def test_no_key_no_header(self, make: Make, rack: Rack) -> None:
        make().health()
        assert "authorization" not in rack.asked[0].headers

    def test_the_environment(self, make: Make, rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LENSRACK_API_KEY", "from-outside")
        make().health()
        assert rack.asked[0].headers["authorization"] == "Bearer from-outside"

    def test_nobody_there(self, make: Make, request: pytest.FixtureRequest) -> None:
        if "transport" in request.node.name:
            pytest.skip("needs a socket that nobody listens on")
        client = make(base_url=f"http://127.0.0.1:{_deaf_port()}", max_retries=1)
        with pytest.raises(lensrack.ConnectError, match=r"GET /healthz: no connection to http://127\.0\.0\.1"):
            client.health()


def _deaf_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


def _fill(writing: int, data: bytes) -> None:
    with open(writing, "wb") as pipe:
        pipe.write(data)


# --- the twins --------------------------------------------------------------------------------------------------------

TWINS = [
    (Client, AsyncClient),
    (sync_module.Tasks, async_module.AsyncTasks),
    (sync_module.Datasets, async_module.AsyncDatasets),
    (sync_module.Jobs, async_module.AsyncJobs),
    (JobHandle, AsyncJobHandle),
]


def _public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in found]


@pytest.mark.parametrize(("one", "other"), TWINS, ids=lambda kind: kind.__name__)
def test_both_clients_have_the_same_methods_and_signatures(one: type, other: type) -> None:
    assert list(_public(one)) == list(_public(other))
    assert _parameters(one.__init__) == _parameters(other.__init__)
    for name, function in _public(one).items():
        twin = _public(other)[name]
        if isinstance(function, property):
            assert isinstance(twin, property)
            continue
        assert _parameters(function) == _parameters(twin), name
        waits = inspect.iscoroutinefunction(twin) or inspect.isasyncgenfunction(twin)
        assert waits != (name == "with_options"), name  # the one that asks nobody anything
        assert function.__doc__ == twin.__doc__, name


def test_wire_is_what_travels() -> None:
    assert wire.JobEvents.model_fields.keys() == {"events", "next", "finished"}
