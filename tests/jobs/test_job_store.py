"""What every job store promises, held against each backend. A new backend is one more entry in `stores.BACKENDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.errors import BadRequest, Conflict, NotFound
from server.jobs.store import JobStore, LeaseLost
from tests.jobs.stores import ERROR, Clock, claim, submit, told

# --- submitting and asking --------------------------------------------------------------------------------------------


def test_a_submitted_job_is_queued_and_can_be_got(store: JobStore, clock: Clock) -> None:
    job = submit(store, tenant="acme", priority=2, publish="if_better")
    assert (job.state, job.attempt, job.failures, job.worker, job.version) == ("queued", 0, 0, None, None)
    assert (job.created_at, job.tenant, job.priority, job.recipe) == (clock.now, "acme", 2, {"epochs": 3})
    assert (job.publish, submit(store).publish) == ("if_better", "always")
    assert store.get(job.id) == job
    assert told(store, job) == ["queued"]


@pytest.mark.parametrize("job_id", ["job_00000000000000000000000000", "", "'; DROP TABLE jobs; --", "ü" * 999])
def test_an_unknown_job_is_not_found(store: JobStore, job_id: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(job_id),
        lambda: store.cancel(job_id),
        lambda: store.events(job_id),
        lambda: store.heartbeat(job_id, 1, 30),
        lambda: store.append_event(job_id, 1, "epoch", {}),
    ]
    for call in calls:
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.code == "job_not_found"


def test_ids_sort_in_the_order_of_submission_even_when_the_clock_stands_or_goes_back(
    store: JobStore, clock: Clock
) -> None:
    ids = []
    for step in (0.0, 0.0, 0.0, 5.0, -3600.0, 0.0):
        clock.now += step
        ids.append(submit(store).id)
    assert ids == sorted(set(ids))
    assert all(len(job_id) == 30 and job_id.startswith("job_") for job_id in ids)


def test_what_json_has_no_word_for_is_stored_as_null(store: JobStore) -> None:
    job = submit(store, recipe={"lr": float("nan"), "betas": (0.9, float("inf")), "name": "é\ud800"})
    assert job.recipe == {"lr": None, "betas": [0.9, None], "name": "é\ud800"}
    running = claim(store)
    assert store.heartbeat(job.id, running.attempt, 30, {"loss": float("nan")}).progress == {"loss": None}
    assert store.append_event(job.id, running.attempt, "epoch", {"loss": float("-inf")}).data == {"loss": None}
    assert store.get(job.id).progress == {"loss": None}


def test_a_failed_write_leaves_nothing(store: JobStore) -> None:
    with pytest.raises(TypeError):
        submit(store, recipe={"model": object()})
    job = submit(store)
    running = claim(store)
    with pytest.raises(TypeError):
        store.append_event(job.id, running.attempt, "epoch", {"what": object()})
    assert told(store, job) == ["queued", "started"]
    assert store.counts()["running"] == 1
    assert store.counts()["queued"] == 0


# --- idempotency ------------------------------------------------------------------------------------------------------


def test_the_same_key_and_content_give_the_same_job(store: JobStore) -> None:
    first = submit(store, idempotency_key="k", recipe={"a": 1, "b": 2})
    running = claim(store)
    again = submit(store, idempotency_key="k", recipe={"b": 2, "a": 1}, max_attempts=9, priority=5)
    assert again == running
    assert again.id == first.id
    assert told(store, first) == ["queued", "started"]


def test_a_key_with_other_content_is_a_conflict_that_names_the_job(store: JobStore) -> None:
    first = submit(store, idempotency_key="k")
    for other in ({"task": "signs"}, {"recipe": {"epochs": 4}}, {"publish": "never"}):
        with pytest.raises(Conflict) as caught:
            submit(store, idempotency_key="k", **other)
        assert caught.value.code == "idempotency_conflict"
        assert caught.value.extra["job"] == first.id
        assert first.id in caught.value.detail
    assert sum(store.counts().values()) == 1


def test_keys_of_two_tenants_are_two_keys(store: JobStore) -> None:
    assert submit(store, idempotency_key="k", tenant="a").id != submit(store, idempotency_key="k", tenant="b").id
    assert submit(store).id != submit(store).id


# --- listing ----------------------------------------------------------------------------------------------------------


def test_pages_are_newest_first_and_meet_every_job_once_while_jobs_arrive(store: JobStore) -> None:
    ids = [submit(store).id for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = store.list(cursor=cursor, limit=3)
        seen += [job.id for job in page]
        submit(store)
        if cursor is None:
            break
    assert seen == ids[::-1]


def test_a_last_page_that_is_full_has_no_next(store: JobStore) -> None:
    for _ in range(4):
        submit(store)
    assert store.list(limit=4)[1] is None
    assert store.list(limit=3)[1] is not None


def test_lists_are_narrowed_by_how_the_tasks_begin(store: JobStore) -> None:
    names = ("acme-a", "acme", "acme-", "acme-zz", "acmf", "b")
    ids = {name: submit(store, name).id for name in names}

    def listed(prefix: str, **narrowed: Any) -> list[str]:
        return [job.task for job in store.list(task_prefix=prefix, **narrowed)[0]]

    assert listed("acme-") == ["acme-zz", "acme-", "acme-a"]
    assert listed("") == [*names[::-1]]
    assert listed("acme-", task="acme-a") == ["acme-a"]
    assert listed("acme-", task="b") == listed("acme-", state="running") == listed("c") == []
    page, following = store.list(task_prefix="acme-", limit=2)
    assert [job.task for job in page] == ["acme-zz", "acme-"]
    assert following == ids["acme-"]
    assert [job.task for job in store.list(task_prefix="acme-", limit=2, cursor=following)[0]] == ["acme-a"]


def test_lists_are_narrowed_by_task_and_state(store: JobStore) -> None:
    a, b, c = submit(store, "a"), submit(store, "b"), submit(store, "a")
    claim(store)
    assert [job.id for job in store.list(task="a")[0]] == [c.id, a.id]
    assert [job.id for job in store.list(state="running")[0]] == [a.id]
    assert [job.id for job in store.list(task="b", state="queued")[0]] == [b.id]
    assert store.list(task="nobody") == ([], None)


def test_a_foreign_cursor_is_refused(store: JobStore) -> None:
    with pytest.raises(BadRequest):
        store.list(cursor="1 OR 1=1")


# --- claiming and the lease -------------------------------------------------------------------------------------------


def test_an_empty_store_has_nothing_to_claim(store: JobStore) -> None:
    assert store.claim("w", 30) is None


def test_claims_go_by_priority_then_age(store: JobStore) -> None:
    low, urgent, middle, urgent2 = (submit(store, priority=priority).id for priority in (0, 9, 1, 9))
    assert [claim(store).id for _ in range(4)] == [urgent, urgent2, middle, low]
    assert store.claim("w", 30) is None


def test_a_claim_gives_an_attempt_and_a_lease(store: JobStore, clock: Clock) -> None:
    submit(store)
    clock.now += 5
    job = claim(store, "w1", 30)
    assert (job.state, job.attempt, job.worker, job.lease_expires_at, job.started_at) == (
        "running", 1, "w1", clock.now + 30, clock.now,
    )  # fmt: skip
    assert store.events(job.id)[-1].data == {"attempt": 1, "worker": "w1"}


def test_a_heartbeat_keeps_the_lease_and_the_progress(store: JobStore, clock: Clock) -> None:
    submit(store)
    job = claim(store)
    for epoch in range(5):
        clock.now += 29
        beaten = store.heartbeat(job.id, job.attempt, 30, {"epoch": epoch})
        assert beaten.lease_expires_at == clock.now + 30
        assert store.claim("thief", 30) is None
    assert store.heartbeat(job.id, job.attempt, 30).progress == {"epoch": 4}


def test_a_lease_expires_at_its_second_and_the_old_attempt_is_fenced(store: JobStore, clock: Clock) -> None:
    submit(store)
    old = claim(store, "w1", 30)
    started = clock.now
    clock.now += 29.9
    assert store.claim("w2", 30) is None
    clock.now = started + 30
    new = claim(store, "w2", 30)
    assert (new.id, new.attempt, new.worker, new.failures, new.started_at) == (old.id, 2, "w2", 1, started)
    assert told(store, new) == ["queued", "started", "retried", "started"]
    assert store.events(new.id)[2].data["error"]["code"] == "lease_expired"
    before = store.get(old.id)
    late: list[Callable[[], object]] = [
        lambda: store.heartbeat(old.id, old.attempt, 30, {"epoch": 99}),
        lambda: store.append_event(old.id, old.attempt, "published", {}),
        lambda: store.finish(old.id, old.attempt, "succeeded", version="v"),
        lambda: store.fail_attempt(old.id, old.attempt, ERROR, retry=False),
        lambda: store.release(old.id, old.attempt),
    ]
    for call in late:
        with pytest.raises(LeaseLost):
            call()
    assert store.get(old.id) == before
    assert len(store.events(old.id)) == 4


def test_a_worker_late_with_its_heartbeat_keeps_a_job_that_nobody_took(store: JobStore, clock: Clock) -> None:
    submit(store)
    job = claim(store, lease_s=30)
    clock.now += 100
    assert store.heartbeat(job.id, job.attempt, 30).lease_expires_at == clock.now + 30
    assert store.claim("w2", 30) is None


YEAR_S = 365 * 86_400.0


@pytest.mark.parametrize("jump_s", [-YEAR_S, -3600.0, 3600.0, YEAR_S])
def test_a_clock_that_is_set_loses_no_job_and_ends_none_twice(store: JobStore, clock: Clock, jump_s: float) -> None:
    """Set forward, a living worker may be taken for dead, and is fenced; set back, its next heartbeat counts anew."""
    waiting, finished = submit(store, "waiting"), submit(store, "over", priority=2)
    store.finish(finished.id, claim(store).attempt, "succeeded", version="v")
    held = submit(store, "held", priority=1)
    mine = claim(store, lease_s=30)
    assert mine.id == held.id
    clock.now += jump_s
    later = submit(store, "later")
    assert later.id > held.id, "ids go on in their order"
    assert {job.id for job in store.list()[0]} == {one.id for one in (waiting, finished, held, later)}
    taken = store.claim("w2", 30)
    assert taken is not None
    if taken.id == held.id:
        assert jump_s > 0
        with pytest.raises(LeaseLost):
            store.heartbeat(mine.id, mine.attempt, 30)
        mine, taken = taken, claim(store, "w2")
    assert taken.id == waiting.id, "the oldest first, whatever the clock says"
    assert store.heartbeat(mine.id, mine.attempt, 30).lease_expires_at == clock.now + 30
    clock.now += 31  # both fall silent, and are followed by the new clock at once
    heirs = {claim(store, "w3").id for _ in range(3)}
    assert heirs == {held.id, waiting.id, later.id}
    assert store.claim("w4", 30) is None
    for job in (held, waiting, later):
        own = store.get(job.id)
        store.finish(own.id, own.attempt, "succeeded", version="v")
        assert told(store, own).count("succeeded") == 1
    assert store.counts() == {"succeeded": 4} | dict.fromkeys(set(store.counts()) - {"succeeded"}, 0)


def test_silence_uses_up_the_attempts_and_the_last_error_is_kept(store: JobStore, clock: Clock) -> None:
    job = submit(store, max_attempts=3)
    first = claim(store)
    store.fail_attempt(job.id, first.attempt, ERROR, retry=True)
    for _ in range(2):
        claim(store)
        clock.now += 31
    assert store.claim("w", 30) is None
    given_up = store.get(job.id)
    assert (given_up.state, given_up.failures, given_up.finished_at) == ("failed", 3, clock.now)
    assert given_up.error is not None
    assert given_up.error["code"] == "too_many_attempts"
    assert "internal: the fit broke" in given_up.error["detail"]
    assert told(store, job) == ["queued", "started", "retried", "started", "retried", "started", "failed"]


def test_a_job_given_up_does_not_hide_the_next(store: JobStore, clock: Clock) -> None:
    lost, waiting = submit(store, max_attempts=1, priority=1), submit(store)
    assert claim(store).id == lost.id
    clock.now += 31
    assert claim(store).id == waiting.id
    assert store.get(lost.id).state == "failed"


# --- the ways an attempt ends -----------------------------------------------------------------------------------------


def test_success_carries_version_and_metrics_and_is_final(store: JobStore, clock: Clock) -> None:
    submit(store)
    running = claim(store)
    clock.now += 3
    done = store.finish(running.id, running.attempt, "succeeded", version="v1", metrics={"accuracy": 0.9})
    assert (done.state, done.version, done.metrics, done.error, done.worker, done.finished_at) == (
        "succeeded", "v1", {"accuracy": 0.9}, None, None, clock.now,
    )  # fmt: skip
    assert store.events(done.id)[-1].data == {"version": "v1"}
    with pytest.raises(LeaseLost):
        store.finish(running.id, running.attempt, "failed", error=ERROR)
    with pytest.raises(LeaseLost):
        store.heartbeat(running.id, running.attempt, 30)
    clock.now += 1000
    assert store.claim("w", 30) is None
    assert store.get(done.id) == done


def test_a_job_does_not_finish_as_running(store: JobStore) -> None:
    running = claim(store) if submit(store) else None
    assert running is not None
    with pytest.raises(ValueError, match="finishes as one of"):
        store.finish(running.id, running.attempt, "running")


def test_a_failed_attempt_is_retried_until_none_is_left(store: JobStore) -> None:
    job = submit(store, max_attempts=2)
    waiting = store.fail_attempt(job.id, claim(store).attempt, ERROR, retry=True)
    assert (waiting.state, waiting.error, waiting.failures, waiting.worker) == ("queued", ERROR, 1, None)
    ended = store.fail_attempt(job.id, claim(store).attempt, ERROR, retry=True)
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error["code"] == "too_many_attempts"


def test_an_error_that_no_retry_mends_fails_at_once(store: JobStore) -> None:
    job = submit(store)
    ended = store.fail_attempt(job.id, claim(store).attempt, ERROR, retry=False)
    assert (ended.state, ended.error) == ("failed", ERROR)
    assert told(store, job) == ["queued", "started", "failed"]


def test_success_after_a_failure_leaves_no_error(store: JobStore) -> None:
    job = submit(store)
    store.fail_attempt(job.id, claim(store).attempt, ERROR, retry=True)
    assert store.finish(job.id, claim(store).attempt, "succeeded", version="v").error is None


def test_a_release_costs_no_attempt_and_is_fenced(store: JobStore) -> None:
    job = submit(store, max_attempts=1)
    for number in range(1, 6):
        running = claim(store)
        assert running.attempt == number
        released = store.release(job.id, number)
        assert (released.state, released.failures) == ("queued", 0)
        with pytest.raises(LeaseLost):
            store.heartbeat(job.id, number, 30)


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    job = store.cancel(submit(store).id)
    assert job.state == "cancelled"
    assert told(store, job) == ["queued", "cancelled"]
    assert store.claim("w", 30) is None


def test_a_running_job_is_asked_to_stop_once(store: JobStore) -> None:
    submit(store)
    running = claim(store)
    for _ in range(2):
        assert store.cancel(running.id).state == "running"
    assert store.heartbeat(running.id, running.attempt, 30).cancel_requested
    assert store.finish(running.id, running.attempt, "cancelled").state == "cancelled"
    assert told(store, running) == ["queued", "started", "cancel_requested", "cancelled"]


@pytest.mark.parametrize("way", ["expired", "released", "failed"])
def test_a_job_that_was_to_be_cancelled_is_not_tried_again(store: JobStore, clock: Clock, way: str) -> None:
    submit(store)
    running = claim(store)
    store.cancel(running.id)
    if way == "released":
        store.release(running.id, running.attempt)
    elif way == "failed":
        store.fail_attempt(running.id, running.attempt, ERROR, retry=True)
    clock.now += 31
    assert store.claim("w2", 30) is None
    assert store.get(running.id).state == "cancelled"


def test_a_job_whose_worker_fell_silent_is_cancelled_at_once(store: JobStore, clock: Clock) -> None:
    submit(store)
    running = claim(store)
    clock.now += 31
    assert store.cancel(running.id).state == "cancelled"
    with pytest.raises(LeaseLost):
        store.heartbeat(running.id, running.attempt, 30)


def test_a_finished_job_cannot_be_cancelled(store: JobStore) -> None:
    submit(store)
    running = claim(store)
    store.finish(running.id, running.attempt, "succeeded", version="v")
    with pytest.raises(Conflict) as caught:
        store.cancel(running.id)
    assert caught.value.code == "job_finished"
    assert "succeeded" in caught.value.detail


# --- events, counts, pruning ------------------------------------------------------------------------------------------


def test_events_are_read_on_from_where_one_left(store: JobStore, clock: Clock) -> None:
    submit(store)
    job = claim(store)
    for epoch in range(5):
        clock.now += 1
        event = store.append_event(job.id, job.attempt, "epoch", {"epoch": epoch})
        assert (event.seq, event.at, event.data) == (epoch + 3, clock.now, {"epoch": epoch})
    assert [event.seq for event in store.events(job.id, after=2, limit=3)] == [3, 4, 5]
    assert [event.seq for event in store.events(job.id, after=5)] == [6, 7]
    assert store.events(job.id, after=7) == []


def test_counts_know_every_state(store: JobStore) -> None:
    assert store.counts() == {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    for _ in range(3):
        submit(store)
    running = claim(store)
    store.finish(running.id, running.attempt, "failed", error=ERROR)
    claim(store)
    assert store.counts() == {"queued": 1, "running": 1, "succeeded": 0, "failed": 1, "cancelled": 0}


def test_pruning_forgets_only_what_finished_long_ago(store: JobStore, clock: Clock) -> None:
    old, waiting = submit(store, idempotency_key="k"), submit(store)
    running = claim(store)
    store.finish(old.id, running.attempt, "succeeded", version="v")
    clock.now += 100
    fresh = store.cancel(submit(store).id)
    assert [(job.id, job.version) for job in store.prune(50)] == [(old.id, "v")]
    assert {job.id for job in store.list()[0]} == {waiting.id, fresh.id}
    with pytest.raises(NotFound):
        store.events(old.id)
    assert submit(store, idempotency_key="k").id != old.id
    assert store.prune(50) == []
