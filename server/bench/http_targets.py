"""The servers of `bench http`, each a separate process tree on loopback, all with the tasks of one store."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from server.settings import Settings

from .load_generator import Plan
from .peer_process import stop, wait_until_well
from .process_tree import Memory
from .temporary_server import ROOT, START_S, environment, temporary_server


@dataclass(frozen=True)
class Target:
    """A server and how to send it requests. `pid`: root of the process tree whose cost counts; `picture`: path with
    `{task}` in it; `polls`: it works while idle, as LitServe does, and is paused while other servers are measured."""

    name: str
    pid: int
    port: int
    path: str
    picture: str
    content_type: str
    polls: bool = False

    def plan(self, tasks: Sequence[str], shares: Sequence[float]) -> Plan:
        return Plan(
            "127.0.0.1", self.port, self.path, self.picture, self.content_type, tasks=tuple(tasks), shares=tuple(shares)
        )

    def check(self, task: str) -> None:
        """Send one request and check the answer. Raises RuntimeError."""
        body = Path(self.picture.replace("{task}", task)).read_bytes()
        url = f"http://127.0.0.1:{self.port}{self.path.replace('{task}', task)}"
        answer = httpx.post(url, content=body, headers={"Content-Type": self.content_type}, timeout=60)
        if answer.is_error or len(answer.json()["predictions"][0]) == 0:
            raise RuntimeError(f"{self.name} answered {answer.status_code}: {answer.text[:300]}")


@dataclass(frozen=True)
class LitServe:
    """A Python that has LitServe, and the app's largest batch, seconds that a batch waits to fill, and engine
    threads."""

    python: str
    batch: int = 16
    wait_s: float = 0.0
    threads: int = 1


def bodies(folder: Path, tasks: Sequence[str], pictures: Sequence[Path]) -> None:
    """Every task's picture as a JPEG and as LitServe's JSON."""
    for number, task in enumerate(tasks):
        data = pictures[number % len(pictures)].read_bytes()
        (folder / f"{task}.jpg").write_bytes(data)
        (folder / f"{task}.json").write_text(json.dumps({"task": task, "image": base64.b64encode(data).decode()}))


@contextmanager
def ours(name: str, folder: Path, store: str, dtype: str, more: Mapping[str, str] | None = None) -> Iterator[Target]:
    """Our server, without a worker: there is nothing to fit."""
    settings = {"LENSRACK_WORKERS": "0", "LENSRACK_DTYPE": dtype, "LENSRACK_SAMPLE_TASKS": "false", **(more or {})}
    with temporary_server(store=store, settings=settings) as (url, _, pid):
        yield Target(name, pid, urlsplit(url).port or 0, "/predict/{task}", str(folder / "{task}.jpg"), "image/jpeg")


@contextmanager
def fastapi(python: str, folder: Path, store: str, threads: int) -> Iterator[Target]:
    with _peer(python, "fastapi", store, ("--threads", str(threads))) as (port, pid):
        yield Target("FastAPI, a forward each", pid, port, "/predict/{task}", str(folder / "{task}.jpg"), "image/jpeg")


@contextmanager
def litserve(
    how: LitServe, folder: Path, store: str, *, model_per_task: bool = False, tasks: int = 0
) -> Iterator[Target]:
    """`model_per_task`: a whole model for each task; `tasks`: the first `tasks` of the store, 0: all."""
    more = ["--batch", str(how.batch), "--wait", str(how.wait_s), "--threads", str(how.threads), "--tasks", str(tasks)]
    name = "LitServe, a copy a task" if model_per_task else "LitServe, by task"
    with _peer(how.python, "litserve", store, [*more, "--own-models"] if model_per_task else more) as (port, pid):
        picture = str(folder / "{task}.json")
        yield Target(name, pid, port, "/predict", picture, "application/json", polls=True)


class Copies(NamedTuple):
    """Memory of a process with a model for one task, and of one with a model for each of `tasks` tasks."""

    tasks: int
    first: Memory
    every: Memory


def copies(python: str, store: str) -> Copies:
    """Measure the copies without a server around them."""
    (_, first), (count, every) = (_copies(python, store, tasks) for tasks in (1, 0))
    return Copies(count, first, every)


def _copies(python: str, store: str, tasks: int) -> tuple[int, Memory]:
    command = _command(python, "copies", store, ("--tasks", str(tasks)))
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the copies could not be made:\n{done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return int(figures.pop("copies")), Memory(**figures)


def _command(python: str, kind: str, store: str, more: Sequence[str]) -> list[str]:
    settings = Settings()
    weights = ("--weights", str(settings.backbone_weights.resolve())) if settings.backbone_weights else ()
    common = ("--store", store, "--backbone", settings.backbone, *weights)
    module = "server.bench.litserve_peer" if kind == "litserve" else "server.bench.peers"
    return [python, "-m", module, kind, *common, *more]


@contextmanager
def _peer(python: str, kind: str, store: str, more: Sequence[str]) -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as folder:
        log_file = Path(folder) / "log"
        with log_file.open("wb") as log:
            command = _command(python, kind, store, ("--port", str(port), *more))
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            path = "health" if kind == "litserve" else "openapi.json"
            wait_until_well(process, f"http://127.0.0.1:{port}/{path}", START_S, log_file.read_text)
            yield port, process.pid
        finally:
            stop(process)
