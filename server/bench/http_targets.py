"""The servers of `bench http`, each a process tree of its own on loopback, all with the tasks of one store."""

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
from .own_server import ROOT, START_S, environment, own_server
from .peer_process import stop, wait_until_well
from .process_tree import Memory


@dataclass(frozen=True)
class Target:
    """A server and how it is asked. `pid`: of the process whose tree is charged; `picture`: with `{task}` in it;
    `polls`: it is at work while nobody asks it, as LitServe is, and stands still while others are asked.
    """

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
        """One question, answered as it should be. Raises RuntimeError."""
        body = Path(self.picture.replace("{task}", task)).read_bytes()
        url = f"http://127.0.0.1:{self.port}{self.path.replace('{task}', task)}"
        answer = httpx.post(url, content=body, headers={"Content-Type": self.content_type}, timeout=60)
        if answer.is_error or len(answer.json()["predictions"][0]) == 0:
            raise RuntimeError(f"{self.name} answered {answer.status_code}: {answer.text[:300]}")


@dataclass(frozen=True)
class LitServe:
    """A Python that has it, and its app's largest batch, the seconds that one waits to fill, and engine threads."""

    python: str
    batch: int = 16
    wait_s: float = 0.0
    threads: int = 1


def bodies(folder: Path, tasks: Sequence[str], pictures: Sequence[Path]) -> None:
    """Every task's picture as a JPEG and as the JSON that LitServe takes."""
    for number, task in enumerate(tasks):
        data = pictures[number % len(pictures)].read_bytes()
        (folder / f"{task}.jpg").write_bytes(data)
        (folder / f"{task}.json").write_text(json.dumps({"task": task, "image": base64.b64encode(data).decode()}))


@contextmanager
def ours(name: str, folder: Path, store: str, dtype: str, more: Mapping[str, str] | None = None) -> Iterator[Target]:
    """Without a worker: there is nothing to fit."""
    settings = {"LENSRACK_WORKERS": "0", "LENSRACK_DTYPE": dtype, "LENSRACK_SAMPLE_TASKS": "false", **(more or {})}
    with own_server(store=store, settings=settings) as (url, _, pid):
        yield Target(name, pid, urlsplit(url).port or 0, "/predict/{task}", str(folder / "{task}.jpg"), "image/jpeg")


@contextmanager
def fastapi(python: str, folder: Path, store: str, threads: int) -> Iterator[Target]:
    with _peer(python, "fastapi", store, ("--threads", str(threads))) as (port, pid):
        yield Target("FastAPI, a forward each", pid, port, "/predict/{task}", str(folder / "{task}.jpg"), "image/jpeg")


@contextmanager
def litserve(how: LitServe, folder: Path, store: str, *, own_models: bool = False, tasks: int = 0) -> Iterator[Target]:
    """`own_models`: a whole model for each task; `tasks`: of the store, the first so many, 0: all."""
    more = ["--batch", str(how.batch), "--wait", str(how.wait_s), "--threads", str(how.threads), "--tasks", str(tasks)]
    name = "LitServe, a copy a task" if own_models else "LitServe, by task"
    with _peer(how.python, "litserve", store, [*more, "--own-models"] if own_models else more) as (port, pid):
        picture = str(folder / "{task}.json")
        yield Target(name, pid, port, "/predict", picture, "application/json", polls=True)


class Copies(NamedTuple):
    """Of a process with a model for one task, and of one with a model for each of so many `tasks`."""

    tasks: int
    first: Memory
    every: Memory


def copies(python: str, store: str) -> Copies:
    """Without a server around them."""
    (_, first), (count, every) = (_copies(python, store, tasks) for tasks in (1, 0))
    return Copies(count, first, every)


def _copies(python: str, store: str, tasks: int) -> tuple[int, Memory]:
    command = _command(python, "copies", store, ("--tasks", str(tasks)))
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the copies could not be made:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found.pop("copies")), Memory(**found)


def _command(python: str, kind: str, store: str, more: Sequence[str]) -> list[str]:
    settings = Settings()
    weights = ("--weights", str(settings.backbone_weights.resolve())) if settings.backbone_weights else ()
    own = ("--store", store, "--backbone", settings.backbone, *weights)
    module = "server.bench.litserve_peer" if kind == "litserve" else "server.bench.peers"
    return [python, "-m", module, kind, *own, *more]


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
