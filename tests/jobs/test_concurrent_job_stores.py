"""Several threads and processes on one job store: each job is claimed once, and a kill leaves whole jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.jobs.store import JobStore, LeaseLost
from tests.jobs.stores import Backend, Clock, claim, submit, told


def test_one_key_sent_by_many_at_once_makes_one_job(backend: Backend, clock: Clock) -> None:
    store = backend.open(clock)
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: submit(store, idempotency_key="k").id, range(40)))
    assert len(set(jobs)) == 1
    assert store.counts()["queued"] == 1
    store.close()


def test_events_have_no_gaps_under_concurrent_appends(store: JobStore) -> None:
    submit(store)
    job = claim(store)
    with ThreadPoolExecutor(8) as pool:
        appended = list(pool.map(lambda n: store.append_event(job.id, job.attempt, "epoch", {"n": n}).seq, range(120)))
    events = store.events(job.id)
    assert sorted(appended) == list(range(3, 123))
    assert [event.seq for event in events] == list(range(1, 123))
    assert sorted(event.data["n"] for event in events[2:]) == list(range(120))


def test_what_one_opening_writes_another_reads(backend: Backend, store: JobStore, clock: Clock) -> None:
    job = submit(store, tenant="acme", recipe={"lr": 0.1, "nested": {"é": [1, None, True]}})
    other = backend.open(clock)
    assert other.get(job.id) == job
    other.close()


CLAIM_ALL = """
print("ready", flush=True)
while (word := sys.stdin.readline()) and (job := store.claim(sys.argv[1], 60)) is not None:
    print(json.dumps([job.id, job.attempt]), flush=True)
    store.append_event(job.id, job.attempt, "epoch", {"worker": sys.argv[1]})
    store.finish(job.id, job.attempt, "succeeded", version="v")
store.close()
"""


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def test_four_processes_claim_fifty_jobs_each_exactly_once(backend: Backend) -> None:
    store = backend.open(time.time)
    ids = [submit(store).id for _ in range(50)]
    processes = [backend.process(CLAIM_ALL, f"w{number}") for number in range(4)]
    assert [heard(process) for process in processes] == ["ready"] * 4, "none begins before all are there"
    for process in processes:
        say(process, "one")
    claims = [json.loads(heard(process)) for process in processes]  # and none is done before all have begun
    for process in processes:
        say(process, "next\n" * len(ids))
    claims += [json.loads(line) for process in processes for line in process.communicate(timeout=120)[0].splitlines()]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(claims) == [[job_id, 1] for job_id in ids]
    assert all(told(store, store.get(job_id)) == ["queued", "started", "epoch", "succeeded"] for job_id in ids)
    store.close()


def test_processes_may_open_a_new_store_all_at_once(backend: Backend) -> None:
    script = "print(store.submit('t', 'd', 'linear', {}, max_attempts=1).id); store.close()"
    processes = [backend.process(script) for _ in range(6)]
    ids = {process.communicate(timeout=60)[0].strip() for process in processes}
    store = backend.open(time.time)
    assert {job.id for job in store.list()[0]} == ids
    assert len(ids) == 6
    store.close()


HOLD = """
job = store.claim("doomed", 1.0)
store.append_event(job.id, job.attempt, "epoch", {"epoch": 1})
print(job.attempt, flush=True)
time.sleep(600)
"""


def test_a_killed_worker_is_succeeded_by_another_and_fenced(backend: Backend) -> None:
    store = backend.open(time.time)
    job = submit(store)
    doomed = backend.process(HOLD)
    attempt = int(heard(doomed))
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.communicate()
    lease_ends = store.get(job.id).lease_expires_at or 0.0
    if time.time() < lease_ends - 0.2:
        assert store.claim("early", 30) is None
    time.sleep(max(0.0, lease_ends - time.time()) + 0.01)
    heir = claim(store, "heir")
    assert (heir.id, heir.attempt) == (job.id, attempt + 1)
    with pytest.raises(LeaseLost):
        store.finish(job.id, attempt, "succeeded", version="stale")
    assert store.finish(job.id, heir.attempt, "succeeded", version="good").version == "good"
    assert told(store, job) == ["queued", "started", "epoch", "retried", "started", "succeeded"]
    store.close()


CHURN = """
for number in range(10_000):
    store.submit("t", "d", "linear", {"number": number}, max_attempts=1)
    print(number, flush=True)
"""


def test_a_process_killed_while_writing_leaves_whole_jobs(backend: Backend) -> None:
    """What was answered is kept, and no job is there without its event."""
    writer = backend.process(CHURN)
    answered = [int(heard(writer)) for _ in range(25)][-1]
    os.kill(writer.pid, signal.SIGKILL)
    answered = max([answered, *map(int, writer.communicate()[0].split())])
    store = backend.open(time.time)
    jobs = store.list(limit=100_000)[0]
    assert {job.recipe["number"] for job in jobs} >= set(range(answered + 1))
    assert len(jobs) <= answered + 2
    assert all(told(store, job) == ["queued"] for job in jobs)
    store.close()


def test_threads_that_come_and_go_leave_the_store_usable(store: JobStore) -> None:
    threads = [threading.Thread(target=submit, args=(store,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts()["queued"] == 20
