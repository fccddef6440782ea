"""The steps of `verify.sh`: start, inspect, train, predict, kill each part in turn, compare, remove.

Every step prints one line. The first failed check ends the run with an AssertionError.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from verify_containers import (
    LEFT_OUT,
    SERVICES,
    SOON_S,
    api_key,
    compose,
    containers,
    crash,
    docker,
    every,
    healthy,
    inspect,
    kill,
    name,
    run,
    say,
    start,
    until,
)
from verify_promises import URL, ask_samples, lesser_key, look, look_at_lesser_key

from lensrack import Client, JobHandle, wire
from server.cli.sample_pictures import draw

PROMETHEUS: Final = f"http://127.0.0.1:{os.environ['PROMETHEUS_PORT']}"
RECIPE: Final = {"epochs": 10, "prompts": 4, "batch_size": 4, "seed": 5}

Answers = dict[str, list[tuple[str, float]]]


# --- checks -----------------------------------------------------------------------------------------------------------


def all_up() -> bool:
    running = [each for service in SERVICES if service != "secrets" for each in containers(service)]
    for each in running:
        assert inspect(each)["RestartCount"] < 5, f"{name(each)} does not stay up"
    return all(map(healthy, running)) and answers_http(f"{URL}/readyz")


def answers_http(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(client: Client, pictures: list[Path]) -> Answers:
    """Return the answers of the two trained tasks for every picture, and of the bundled tasks for their samples."""
    found = ask_samples(client)
    for path in pictures:
        many = client.predict_many(["calm", "shaken"], path, top_k=8)
        for task in ("calm", "shaken"):
            found[f"{task} {path.name} of {path.parent.name}"] = [(p.label, p.score) for p in many[task].predictions]
    return found


def require_same(before: Answers, after: Answers) -> None:
    """Requires the same labels in the same order, and scores that differ only by the order of sums in a batch."""
    assert before.keys() == after.keys()
    for key, expected in before.items():
        assert [label for label, _ in expected] == [label for label, _ in after[key]], key
        worst = max(abs(a - b) for (_, a), (_, b) in zip(expected, after[key], strict=True))
        assert worst < 1e-5, f"{key}: scores moved by {worst}"


def kept(client: Client) -> dict[str, object]:
    """Return everything that must survive the loss of any container."""
    tasks = sorted(task.task for task in client.tasks.list())
    return {
        "datasets": sorted(dataset.id for dataset in client.datasets.list()),
        "versions": {task: [each.version for each in client.tasks.versions(task)] for task in tasks},
        "live": {task: [t.version for t in client.tasks.alias(task).targets] for task in tasks},
        "jobs": sorted((job.id, job.state) for job in client.jobs.iterate() if job.finished),
    }


def require_kept(before: dict[str, object], after: dict[str, object]) -> None:
    for what, expected in before.items():
        assert expected == after[what], f"{what}: {expected} became {after[what]}"


# --- how a part breaks ------------------------------------------------------------------------------------------------


@contextmanager
def asking(client: Client, picture: Path) -> Iterator[list[float]]:
    """Sends predictions all the time; yields the seconds that each answer took. Raises if a request failed."""
    stop, answered, failed = threading.Event(), list[float](), list[BaseException]()

    def ask_on() -> None:
        while not stop.wait(0.05):
            asked_at = time.monotonic()
            try:
                client.predict("calm", picture)
                answered.append(time.monotonic() - asked_at)
            except Exception as error:
                failed.append(error)

    asker = threading.Thread(target=ask_on)
    asker.start()
    try:
        yield answered
    finally:
        stop.set()
        asker.join()
    assert not failed, f"{len(failed)} of {len(failed) + len(answered)} requests failed, the first: {failed[0]!r}"


def meanwhile(answered: list[float]) -> str:
    return f"{len(answered)} requests meanwhile, all answered, each within {max(answered, default=0.0):.1f} s"


def owner(job: str, workers: list[str]) -> str:
    """Return the worker that claimed a job last, according to its log."""
    found = [each for each in workers if job in run("sh", "-c", f"docker logs {each} 2>&1") and healthy(each)]
    assert len(found) == 1, found
    return found[0]


def epochs(client: Client, job: JobHandle) -> list[int]:
    return [event.data["epoch"] for event in client.jobs.events(job.id).events if event.type == "epoch"]


# --- the steps --------------------------------------------------------------------------------------------------------


def bring_up() -> None:
    compose("up", "-d", "--scale", "server=2", "--scale", "worker=2", *SERVICES)
    until("everything is up", all_up)
    until("both servers are ready behind the proxy", lambda: all(map(healthy, containers("server"))))


def train(client: Client, task: str, dataset: str, **recipe: Any) -> JobHandle:
    return client.train(task, dataset, "vpt_deep", {**RECIPE, **recipe})


def break_servers(client: Client, picture: Path) -> None:
    first, second = containers("server")
    with asking(client, picture) as answered:
        crash(first)
        until(f"{name(first)} is healthy", lambda: healthy(first))
        kill(second)
        time.sleep(3)
        start(second)
        time.sleep(2)
    say(f"each server was killed and came back; {meanwhile(answered)}")
    until("both servers answer", lambda: both_answer(client, picture, (first, second)))


ROWS: Final = (
    "import urllib.request as r; print(sum(float(l.split()[-1]) for l in "
    "r.urlopen('http://127.0.0.1:8000/metrics').read().decode().splitlines() if l.startswith('lensrack_rows_total')))"
)


def both_answer(client: Client, picture: Path, servers: tuple[str, str]) -> bool:
    before = [float(docker("exec", each, "python", "-c", ROWS)) for each in servers]
    for _ in range(20):
        client.predict("calm", picture)
    after = [float(docker("exec", each, "python", "-c", ROWS)) for each in servers]
    return all(now > then for now, then in zip(after, before, strict=True))


def break_a_worker(client: Client, dataset: str) -> None:
    """Kills a worker during a job: the other worker resumes from the last checkpoint."""
    job = train(client, "shaken", dataset)
    until("three epochs are done", lambda: len(epochs(client, job)) >= 3)
    workers = containers("worker")
    victim = owner(job.id, workers)
    kill(victim)
    assert not job.refresh().finished, "the worker was killed after the end of the job"
    done = job.wait(SOON_S)
    assert done.attempt == 2, done.attempt
    seen = epochs(client, job)
    assert sorted(set(seen)) == list(range(1, RECIPE["epochs"] + 1)), seen
    say(f"{name(victim)} was killed during a job; the other worker finished it: epochs {seen}, {ending(done)}")
    start(victim)
    (other,) = {*workers} - {victim}
    crash(other)
    until(f"{name(other)} is healthy", lambda: healthy(other))
    say(f"{name(other)} crashed and was restarted")


def ending(job: wire.Job) -> str:
    return f"{job.state} at attempt {job.attempt}"


def break_redis(client: Client, dataset: str, picture: Path) -> None:
    """Kills redis while jobs run and one more is queued."""
    before = kept(client)
    jobs = [train(client, f"through-{number}", dataset, seed=number) for number in range(3)]
    until("a job is running", lambda: any(epochs(client, job) for job in jobs))
    redis = containers("redis")[0]
    with asking(client, picture) as answered:
        kill(redis)
        time.sleep(8)
        start(redis)
    say(f"redis was killed for 8 s; {meanwhile(answered)}, from the racks and caches of the servers")
    ended = [job.wait(SOON_S) for job in jobs]
    say("the running and the queued jobs: " + ", ".join(f"{job.state} at attempt {job.attempt}" for job in ended))
    after = kept(client)
    for task, versions in before["versions"].items():  # type: ignore[attr-defined]
        assert versions == after["versions"][task]  # type: ignore[index]
    assert set(before["jobs"]) <= set(after["jobs"])  # type: ignore[call-overload]


def watch_stream(client: Client, dataset: str) -> None:
    """Checks that events arrive as they happen, not all at the end of the job."""
    job = train(client, "watched", dataset)
    seen: list[float] = []
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {api_key()}"}
    with httpx.stream("GET", f"{URL}/train/{job.id}/events", headers=headers, timeout=SOON_S) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: epoch"):
                seen.append(time.time())
    ended = job.refresh().finished_at or 0.0
    assert len(seen) == RECIPE["epochs"], seen
    assert seen[0] < ended - 0.5, "the first epoch arrived only at the end of the job"

    say(f"events through the proxy: {len(seen)} epochs, the first of them {ended - seen[0]:.1f} s before the end")


def break_the_watchers(client: Client) -> None:
    proxy = containers("proxy")[0]
    kill(proxy)
    start(proxy)
    until("the proxy answers", lambda: answers_http(f"{URL}/readyz"))
    say("the proxy was killed and came back")
    if "prometheus" in SERVICES:
        until("prometheus sees both servers", lambda: scraped(since=0.0) == 2)
        kill(containers("prometheus")[0])
        killed = time.time()
        start(containers("prometheus")[0])
        until("prometheus sees both servers again", lambda: scraped(since=killed) == 2)
        say("prometheus was killed and came back; it scrapes both servers")


def scraped(since: float) -> int:
    """Return how many servers Prometheus has scraped since then; queries show older samples for minutes."""
    asked = {"query": f'timestamp(lensrack_build_info{{job="lensrack-server"}}) > {since}'}
    try:
        found = httpx.get(f"{PROMETHEUS}/api/v1/query", params=asked, timeout=5).json()
    except (httpx.HTTPError, ValueError):
        return 0
    return len({each["metric"]["instance"] for each in found["data"]["result"]})


def main() -> None:
    size = int(docker("image", "inspect", "-f", "{{.Size}}", f"{os.environ['IMAGE_NAME']}:cpu"))
    say(
        f"the image has {size / 1e6:.0f} MB; services: {', '.join(SERVICES)}; left out: {', '.join(LEFT_OUT) or 'none'}"
    )
    bring_up()
    say("2 servers and 2 workers are up behind the proxy")
    look()
    with tempfile.TemporaryDirectory() as scratch, Client(URL, api_key(), timeout=60, max_retries=8) as client:
        ask_samples(client)
        say("the bundled tasks answer correctly: a 7 is a 7, a face is a face")
        lesser = lesser_key()
        draw(Path(scratch), per_class=12)
        pictures = sorted((Path(scratch) / "fruit" / "test").rglob("*.png"))[::3]
        dataset = client.datasets.upload(Path(scratch) / "fruit" / "train").id
        calm = train(client, "calm", dataset).wait(SOON_S)
        say(f"trained a task by {calm.method}: {calm.state}")
        break_a_worker(client, dataset)
        answers = ask(client, pictures)
        require_same(
            {key.removeprefix("calm "): each for key, each in answers.items() if key.startswith("calm ")},
            {key.removeprefix("shaken "): each for key, each in answers.items() if key.startswith("shaken ")},
        )
        say(f"{len(pictures)} pictures: the interrupted job gives the same answers as an undisturbed one")
        watch_stream(client, dataset)
        before = kept(client)
        break_servers(client, pictures[0])
        require_kept(before, kept(client))
        require_same(answers, ask(client, pictures))
        break_redis(client, dataset, pictures[0])
        require_same(answers, ask(client, pictures))
        break_the_watchers(client)
        before = kept(client)
        compose("down", "--timeout", "50")
        assert not every()
        bring_up()
        require_kept(before, kept(client))
        require_same(answers, ask(client, pictures))
        look_at_lesser_key(lesser)
        say("the deployment was removed and started again; the keys are the same")
        lost = [key for key in ("datasets", "versions", "live", "jobs") if before[key] != kept(client)[key]]
        assert not lost
        counts = {key: len(each) for key, each in before.items()}  # type: ignore[arg-type]
        say(f"nothing was lost: {counts}; every answer is the same")
    compose("down", "--volumes", "--timeout", "50")
    say("removed with all volumes: verified")


if __name__ == "__main__":
    main()
