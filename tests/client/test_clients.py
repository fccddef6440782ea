"""What both clients do: predictions, tasks, options; and that the two have the same methods."""

from __future__ import annotations

import inspect
import io
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lensrack
from lensrack import AsyncClient, AsyncJobHandle, Client, JobHandle, wire
from lensrack import async_client as async_module
from lensrack import client as sync_module
from tests.client.scripted_rack import VERSION, Rack, Told, problem, told
from tests.client.ways import PIXELS, Make, in_process_and_sockets, over_sockets


class TestPredictions:
    @in_process_and_sockets
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

    @in_process_and_sockets
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

    @over_sockets
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

    @in_process_and_sockets
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

    @over_sockets
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

    @in_process_and_sockets
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

    @in_process_and_sockets
    def test_names_are_quoted(self, make: Make, rack: Rack) -> None:
        with pytest.raises(lensrack.NotFoundError):
            make().tasks.delete("../x?y#z")
        assert rack.asked[0].path == "/tasks/../x?y#z"


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

    @over_sockets
    def test_nobody_there(self, make: Make) -> None:
        client = make(base_url=f"http://127.0.0.1:{_deaf_port()}", max_retries=1)
        with pytest.raises(lensrack.ConnectError, match=r"GET /healthz: no connection to http://127\.0\.0\.1"):
            client.health()


def _deaf_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


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
    assert wire.JobEvents.model_fields.keys() == {"events", "next", "finished", "progress"}
