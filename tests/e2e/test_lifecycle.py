"""Processes come and go: a fresh machine, a worker that is killed, a server that is killed or asked to stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.e2e.forked_server import forked, refused
from tests.e2e.server_process import ROOT, serving
from tests.e2e.test_engine_faults import ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder)
    return folder


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {seconds} s"
        time.sleep(0.05)


def worker_pids(server_pid: int) -> list[int]:
    children = psutil.Process(server_pid).children(recursive=True)
    return [child.pid for child in children if child.name().startswith("worker") or "work" in child.cmdline()]


def test_a_fresh_machine_serves_with_the_untrained_stand_in_and_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        ready = httpx.get(f"{server.url}/readyz").json()
        assert ready["ready"]
        assert ready["backbone"]["arch"] == "untrained"
        assert ready["backbone"]["trained"] is False
        assert any("untrained" in note for note in ready["notes"])
        assert "untrained" in server.log
        assert server.url.startswith("http://127.0.0.1:")
        assert server.stop() == 0
    assert "untrained" in (ROOT / "README.md").read_text()


def test_everything_survives_a_restart(tmp_path: Path, pictures: Path) -> None:
    lemon = sorted((pictures / "fruit" / "test" / "lemon").iterdir())[0]
    with forked(tmp_path, workers="1") as server, Client(server.url) as client:
        dataset = client.datasets.upload(pictures / "fruit" / "train")
        client.train("fruit", dataset.id, method="linear").wait(timeout=120)
        before = client.predict("fruit", lemon, top_k=3)
    with forked(tmp_path, workers="1") as server, Client(server.url) as client:
        after = client.predict("fruit", lemon, top_k=3)
        assert after.version == before.version
        assert [(p.label, pytest.approx(p.score, abs=1e-5)) for p in after] == [(p.label, p.score) for p in before]
        assert client.datasets.get(dataset.id).images == dataset.images


def test_a_killed_worker_is_replaced_and_its_job_finishes(tmp_path: Path, pictures: Path) -> None:
    with forked(tmp_path, workers="1", lease_s="2", worker_nice="0") as server, Client(server.url) as client:
        dataset = client.datasets.upload(pictures / "fruit" / "train")
        job = client.train("fruit", dataset.id, method="vpt_deep", recipe={"epochs": 6, "prompts": 2})
        until(lambda: client.jobs.get(job.id).progress.epoch >= 1, "the first epoch began")
        (first,) = worker_pids(server.process.pid)
        os.kill(first, signal.SIGKILL)
        done = job.wait(timeout=180)
        assert done.state == "succeeded"
        assert done.attempt == 2
        assert worker_pids(server.process.pid) != [first]
        assert client.predict("fruit", sorted((pictures / "fruit" / "test" / "plum").iterdir())[0]).best.label


def test_a_cancelled_job_ends_soon_and_moves_no_alias(tmp_path: Path, pictures: Path) -> None:
    with forked(tmp_path, workers="1") as server, Client(server.url) as client:
        dataset = client.datasets.upload(pictures / "weather" / "train")
        job = client.train("weather", dataset.id, method="vpt_deep", recipe={"epochs": 1000})
        until(lambda: client.jobs.get(job.id).progress.epoch >= 1, "the first epoch began")
        started = time.monotonic()
        job.cancel()
        until(lambda: client.jobs.get(job.id).state == "cancelled", "the job ended", 15)
        print(f"cancelled after {time.monotonic() - started:.2f} s")
        assert client.tasks.list() == []


def test_no_worker_outlives_a_killed_server(tmp_path: Path) -> None:
    with forked(tmp_path, workers="1") as server:
        until(lambda: "worker ready" in server.log, "the worker came up")
        (worker,) = worker_pids(server.process.pid)
        server.kill()
        until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie", "it left", 20)


def test_stopping_gives_the_job_back_to_the_queue(tmp_path: Path, pictures: Path) -> None:
    with forked(tmp_path, workers="1") as server, Client(server.url) as client:
        dataset = client.datasets.upload(pictures / "weather" / "train")
        job = client.train("weather", dataset.id, method="vpt_deep", recipe={"epochs": 30})
        until(lambda: client.jobs.get(job.id).progress.epoch >= 1, "the first epoch began")
        assert server.stop() == 0
    with forked(tmp_path, workers="1") as server, Client(server.url) as client:
        until(lambda: client.jobs.get(job.id).state == "running", "the next server's worker took it up", 30)
        client.jobs.cancel(job.id)


@pytest.mark.parametrize("fronts", ["0", "1"])
def test_ctrl_c_stops_and_a_second_one_at_once(tmp_path: Path, fronts: str) -> None:
    with forked(tmp_path / "idle", fronts=fronts) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(40) == 0
        assert server.log.rstrip().endswith("stopped")
    with (
        forked(tmp_path / "busy", fronts=fronts, fault="hang", drain_timeout_s="60") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(ask, server, "white")
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        until(lambda: "again (Ctrl-C) to stop at once" in server.log, "it drains")
        time.sleep(0.5)
        assert server.process.poll() is None, "it waits for the answer"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(8) == 130
        assert isinstance(asked.exception(10), httpx.TransportError)
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"backbone": "no_such_vit"}, "unknown backbone 'no_such_vit'"),
        ({"backbone": "deit_tiny_patch16_224", "backbone_weights": "/nowhere.safetensors"}, "cannot be read"),
        ({"host": "0.0.0.0"}, "LENSRACK_ALLOW_OPEN"),
        ({"port": "99999"}, "LENSRACK_PORT"),
        ({"backbone": "vit_tiny_patch16_225"}, "the nearest: vit_tiny_patch16_"),
        ({"device": "tpu"}, "LENSRACK_DEVICE: expected auto"),
        ({"log_level": "loud"}, "LENSRACK_LOG_LEVEL: expected 'debug'"),
        ({"store": "ftp://x"}, "file://DIR"),
        ({"jobs": "redis://127.0.0.1:1/jobs"}, "LENSRACK_JOBS: expected redis://"),
        ({"home": "/proc/nowhere"}, "LENSRACK_HOME: expected a folder that can be written"),
        ({"host": "192.0.2.1", "allow_open": "1"}, "LENSRACK_HOST: expected an address of this machine"),
        (
            {"backbon": "bundled", "port": "99999"},
            "LENSRACK_BACKBON: no setting has this name, and it has no effect",
        ),
    ],
)
def test_a_wrong_setting_is_a_sentence_not_a_traceback(tmp_path: Path, settings: dict[str, str], says: str) -> None:
    code, said = refused(tmp_path, settings, None if "port" in settings else 0)
    assert code in {1, 2}
    assert says in said
    assert "Traceback" not in said


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = refused(tmp_path, {}, taken.getsockname()[1])
    assert code == 1
    assert re.search(r"cannot start: LENSRACK_PORT: .*in use", said)
    assert "Traceback" not in said
