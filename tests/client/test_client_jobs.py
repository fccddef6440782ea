"""Training and comparing through both clients: jobs, their events, waiting for them."""

from __future__ import annotations

import time
from typing import Any

import pytest

import lensrack
from tests.client.scripted_rack import VERSION, Rack, Told, problem
from tests.client.ways import Make, in_process_and_sockets, over_sockets


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

    @over_sockets
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

    @in_process_and_sockets
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
