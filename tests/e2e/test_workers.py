"""Workers beside engines and front ends: a killed engine does not end them, and they do not outlive the manager."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from lensrack import Client
from server.app.stores import open_jobs
from server.cli.sample_pictures import draw
from server.settings import Settings
from tests.e2e.forked_server import forked
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_lifecycle import until, worker_pids

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RUNNING, RESTARTS = 'lensrack_workers{state="running"}', "lensrack_worker_restarts_total"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder)
    return folder / "weather" / "train"


@contextmanager
def served(home: Path, **settings: str) -> Iterator[ServerProcess]:
    """A server of an engine, a front end and a worker."""
    with forked(home, **{"fronts": "1", "workers": "1", "worker_nice": "0", **settings}) as server:
        yield server


def pid_of(server: ServerProcess, name: str) -> int:
    """The latest process of a name, as the log tells."""
    return int(re.findall(rf"{name}: pid (\d+)", server.log)[-1])


def kill(server: ServerProcess, name: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Kill a process and wait until it has been restarted; return which it was."""
    before = pid_of(server, name)
    os.kill(before, number)
    until(lambda: pid_of(server, name) != before, f"{name} is restarted")
    return before


def metric(server: ServerProcess, name: str) -> float | None:
    """None where the server does not answer or does not know the metric."""
    try:
        lines = httpx.get(f"{server.url}/metrics", timeout=20).text.splitlines()
    except httpx.TransportError:
        return None
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), None)


def workers_check(server: ServerProcess) -> str:
    try:
        return str(httpx.get(f"{server.url}/readyz", timeout=20).json()["checks"]["workers"])
    except httpx.TransportError:
        return ""


def worker_of(home: Path, job: str) -> int:
    """The process of the worker that fits a job, as the job store has it."""
    jobs = open_jobs(Settings(home=home))
    try:
        return int(str(jobs.get(job).worker).rpartition("-")[2])
    finally:
        jobs.close()


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_engine_does_not_stop_training(tmp_path: Path, pictures: Path) -> None:
    with served(tmp_path) as server, Client(server.url) as client:
        dataset = client.datasets.upload(pictures)
        job = client.train("weather", dataset.id, method="vpt_deep", recipe={"epochs": 30, "prompts": 2})
        until(lambda: client.jobs.get(job.id).progress.epoch >= 1, "the first epoch has ended")
        worker = pid_of(server, "worker-0")
        kill(server, "engine")
        assert client.jobs.get(job.id).state == "running", "the job is over already: the test shows nothing"
        done = job.wait(timeout=180)
        assert (done.state, done.attempt) == ("succeeded", 1)
        assert worker_pids(server.process.pid) == [worker]
        assert f"worker ready, pid {worker}" in server.log
        until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, "the engine is back")


def test_a_killed_worker_is_restarted_and_counted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with served(tmp_path, workers="2", worker_metrics_port=str(port)) as server:
        assert workers_check(server) == "2 of 2"
        assert (metric(server, RUNNING), metric(server, RESTARTS)) == (2, 0)
        first, second = pid_of(server, "worker-0"), pid_of(server, "worker-1")
        until(lambda: server.log.count("worker ready") == 2, "both workers are up")
        for number in (0, 1):
            assert "lensrack_worker_jobs" in httpx.get(f"http://127.0.0.1:{port + number}/metrics").text
        os.kill(first, signal.SIGKILL)
        until(lambda: metric(server, RESTARTS) == 1, "the end is counted")
        until(lambda: workers_check(server) == "2 of 2", "another worker runs")
        assert pid_of(server, "worker-0") != first
        assert pid_of(server, "worker-1") == second
        for name in ("engine", "front-0"):  # what is forked later must not report the manager's figures once more
            kill(server, name)
        until(lambda: workers_check(server) == "2 of 2", "another front end answers")
        assert (metric(server, RUNNING), metric(server, RESTARTS)) == (2, 1)
        assert metric(server, 'lensrack_workers{state="wanted"}') == 2


def test_a_server_in_one_process_restarts_its_worker_as_well(tmp_path: Path) -> None:
    with served(tmp_path, fronts="0") as server:
        [first] = worker_pids(server.process.pid)
        os.kill(first, signal.SIGKILL)
        until(lambda: metric(server, RESTARTS) == 1, "the end is counted")
        until(lambda: workers_check(server) == "1 of 1", "another worker runs")
        assert metric(server, RUNNING) == 1
        [second] = worker_pids(server.process.pid)
        assert second != first
        assert server.stop() == 0
        assert ended(second)


def test_a_worker_that_cannot_run_is_missed_and_the_server_serves(tmp_path: Path) -> None:
    with served(tmp_path, worker_metrics_host="no.such.host.invalid", worker_metrics_port="1") as server:
        until(lambda: workers_check(server) == "0 of 1", "its end is reported")
        until(lambda: (metric(server, RESTARTS) or 0) >= 2, "it is tried again and again")
        ready = httpx.get(f"{server.url}/readyz").json()
        assert ready["ready"]
        assert "the worker cannot start" in server.log
        assert re.search(r"worker-0 \(pid \d+\) ended with 1", server.log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_manager(tmp_path: Path, pictures: Path, number: signal.Signals) -> None:
    """Of two, one is at work on a job, which goes back to the queue at once, and one has only just begun to start."""
    with served(tmp_path, workers="2", lease_s="3600") as server, Client(server.url) as client:
        dataset = client.datasets.upload(pictures)
        job = client.train("weather", dataset.id, method="vpt_deep", recipe={"epochs": 1000, "prompts": 2})
        until(lambda: client.jobs.get(job.id).progress.epoch >= 1, "the first epoch has ended")
        names = ("worker-0", "worker-1")
        [idle] = [name for name in names if pid_of(server, name) != worker_of(tmp_path, job.id)]
        kill(server, idle)
        workers = [pid_of(server, name) for name in names]
        server.process.send_signal(number)
        server.process.wait(40)
        until(lambda: all(ended(pid) for pid in workers), "the workers have left", 20)
    with served(tmp_path, workers="0") as server, Client(server.url) as client:
        assert client.jobs.get(job.id).state == "queued"


def test_a_process_that_stands_still_is_replaced(tmp_path: Path) -> None:
    """Its watchdog stands still as well: the manager looks from outside."""
    with served(tmp_path, workers="0", stuck_s="2") as server:
        for name in ("engine", "front-0"):
            stopped = kill(server, name, signal.SIGSTOP)
            until(lambda: answers_ready(server), f"the server answers with a new {name}")
            assert f"{name} (pid {stopped}) has given no sign of life" in server.log


def answers_ready(server: ServerProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
