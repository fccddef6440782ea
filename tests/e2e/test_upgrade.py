"""An upgrade from the release before: its home, its Redis and its running jobs, both ways and side by side.

The release's tree comes from git; where the clone does not hold it, these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from server.cli.sample_pictures import draw
from tests.conftest import free_port
from tests.e2e.server_process import ROOT, ServerProcess, _url, _wait_ready, environment
from tests.e2e.test_store_faults import Client, picture

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

PREVIOUS = os.environ.get("LENSRACK_PREVIOUS", "396c8f9")  # a commit or a tag
LONG = {"task": "long", "method": "vpt_shallow", "recipe": {"epochs": 60, "search": "none"}}


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("previous")
    archive = subprocess.run(["git", "archive", PREVIOUS], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"the clone does not hold {PREVIOUS}, the release before this one")
    subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
    return tree


@contextmanager
def serving(tree: Path, home: Path, **settings: str) -> Iterator[Client]:
    """A server of a tree; killed at the end where it still runs."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / f"server-{tree.name}.log"
    before = log.stat().st_size if log.exists() else 0
    variables = environment(home, {"workers": "1", "worker_nice": "0", "lease_s": "5", "threads": "1", **settings})
    variables["PYTHONPATH"] = os.pathsep.join((str(tree), str(tree / "client")))
    with log.open("ab") as file:
        command = [sys.executable, "-m", "server", "serve", "--port", str(free_port())]
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file, cwd=tree)
    try:
        server = ServerProcess(process, _url(process, log, before), home, log)
        _wait_ready(server)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            yield Client(http, http.get("/readyz").json()["backbone"]["fingerprint"])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(20)


def dataset(client: Client, folder: Path) -> str:
    draw(folder, per_class=6)
    archive = shutil.make_archive(str(folder / "fruit"), "zip", folder / "fruit" / "train")
    headers = {"content-type": "application/zip"}
    return str(client.http.post("/datasets", content=Path(archive).read_bytes(), headers=headers).json()["id"])


def started(client: Client, job: dict[str, object]) -> str:
    """A job that has done its first epoch."""
    id_ = str(client.http.post("/train", json=job).json()["id"])
    until(lambda: client.http.get(f"/train/{id_}").json()["progress"].get("epoch", 0) >= 1)
    return id_


def until(condition: object, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def succeeded(client: Client, job: str) -> bool:
    state = client.http.get(f"/train/{job}").json()["state"]
    assert state in ("queued", "running", "succeeded")
    return bool(state == "succeeded")


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_home_is_taken_over_with_the_job_that_runs(previous: Path, tmp_path: Path, way: str) -> None:
    """What one wrote, the other serves, and goes on with; a downgrade is an upgrade that was regretted."""
    first, second = (previous, ROOT) if way == "up" else (ROOT, previous)
    home, png = tmp_path / "home", {"content-type": "image/png"}
    with serving(first, home) as client:
        kept = client.bundle("kept", 1)
        assert client.put(kept).status_code == 201
        pictures = dataset(client, tmp_path / "pictures")
        told = client.http.post("/tasks/kept/feedback?label=label+0", content=picture(), headers=png)
        assert told.status_code == 201
        job = started(client, {**LONG, "dataset": pictures})
    with serving(second, home) as client:
        assert client.answers("kept", kept)
        assert client.http.get("/datasets").json()["datasets"][0]["id"] == pictures
        assert client.http.get("/tasks/kept/feedback").json()["images"] == 1
        until(lambda: succeeded(client, job))
        assert client.ask("long").status_code == 200


def test_a_pair_of_both_on_one_redis(previous: Path, tmp_path: Path, redis_url: str) -> None:
    """As during a rolling update: each sees what the other changes, and takes the other's jobs."""
    home = tmp_path / "home"
    shared = {"store": redis_url, "jobs": redis_url}
    with ExitStack() as stack:
        old = stack.enter_context(serving(previous, home, **{**shared, "workers": "0"}))
        new = stack.enter_context(serving(ROOT, home, **shared))
        for writer, reader in ((old, new), (new, old)):
            for seed in (1, 2):
                made = writer.bundle("kept", seed)
                assert writer.put(made).status_code == 201
                until(lambda: reader.answers("kept", made), 10)  # noqa: B023
        assert old.http.delete("/tasks/kept").status_code == 204
        until(lambda: new.ask("kept").status_code == 404, 10)
        pictures = dataset(old, tmp_path / "pictures")
        until(lambda: succeeded(new, started_at(old, {**LONG, "task": "by-new", "dataset": pictures})))
    with serving(previous, home, **shared) as old, serving(ROOT, home, **{**shared, "workers": "0"}) as new:
        job = started(new, {**LONG, "task": "by-old", "dataset": pictures})
        until(lambda: succeeded(new, job))
        assert {task["task"] for task in old.http.get("/tasks").json()["tasks"]} == {"by-new", "by-old"}


def started_at(client: Client, job: dict[str, object]) -> str:
    """The same job however often it is asked for."""
    return str(client.http.post("/train", json=job, headers={"Idempotency-Key": "once"}).json()["id"])
