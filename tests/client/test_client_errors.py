"""Which answers become which errors in both clients, and which requests are sent again."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

import lensrack
from tests.client.scripted_rack import VERSION, Rack, Told, problem, told
from tests.client.ways import PIXELS, Make, in_process_and_sockets, over_sockets


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

    @over_sockets
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

    @in_process_and_sockets
    def test_a_connection_dropped_in_an_answer_is_taken_up_again(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", Told(200, b'{"tasks": [', drop=True))
        assert len(make().tasks.list()) == 2
        assert len(rack.asked) == 2

    @over_sockets
    def test_a_connection_that_always_breaks(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", *[Told(200, b'{"tasks": [', drop=True)] * 3)
        with pytest.raises(lensrack.ConnectError, match="GET /tasks: the connection broke"):
            make(max_retries=1).tasks.list()
        assert len(rack.asked) == 2

    @over_sockets
    def test_a_lost_answer_to_a_delete(self, make: Make, rack: Rack) -> None:
        """The first DELETE worked, its answer was lost; the second finds nothing, which is what was wanted."""
        rack.misbehave("/tasks/trash", Told(200, b"", drop=True), problem(404, "task_not_found"))
        make().tasks.delete("trash")
        with pytest.raises(lensrack.NotFoundError):
            make().tasks.delete("no-such-task")

    @over_sockets
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

    @in_process_and_sockets
    def test_timeout(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/tasks", *[Told(200, b'{"tasks": []}', delay_s=1.5)] * 3)
        started = time.monotonic()
        with pytest.raises(lensrack.RequestTimeout, match=r"no complete answer within 0\.4 s") as caught:
            make(timeout=0.4).tasks.list()
        assert time.monotonic() - started < 1.2
        assert isinstance(caught.value, TimeoutError)

    @in_process_and_sockets
    def test_an_answer_that_drips_does_not_outlive_the_timeout(self, make: Make, rack: Rack) -> None:
        """Every byte comes in time for a read, all of them together do not."""
        rack.misbehave("/tasks", Told(200, b'{"tasks":' + b" " * 30 + b"[]}", drip_s=0.1))
        started = time.monotonic()
        with pytest.raises(lensrack.RequestTimeout):
            make(timeout=0.5).tasks.list()
        assert time.monotonic() - started < 2
