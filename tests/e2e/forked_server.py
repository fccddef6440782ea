"""Real server processes that are up in a second: forks of one that has loaded torch already, as `doomed_worker` has it.

What they run is `python -m server serve`. A `fault` makes the engine break when it is shown a white picture; one of
KILLS ends the process, as a power cut would, once there is a file `armed` in its home.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from tests.e2e.doomed_worker import forge
from tests.e2e.server_process import ServerProcess, _url, _wait_ready, environment


class Forked:
    """A process of multiprocessing with the words of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return cast(int, self._process.pid)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("serve", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def forked(home: Path, *, fault: str = "", port: int = 0, **settings: str) -> Iterator[ServerProcess]:
    """A server that is ready; stopped at the end unless it has ended. It has no workers unless told so."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.log"
    said_before = log.stat().st_size if log.exists() else 0
    log.touch()
    variables = environment(home, {"workers": "0", **settings})
    process = forge().Process(target=_serve, args=(str(home), variables, fault, port))
    process.start()
    server = Forked(process)
    popen = cast("subprocess.Popen[bytes]", server)
    try:
        running = ServerProcess(popen, _url(popen, log, said_before), home, log)
        _wait_ready(running)
        yield running
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


def refused(home: Path, settings: Mapping[str, str], port: int | None = 0) -> tuple[int | None, str]:
    """The exit code of a server that cannot start, and what it said. port: None for the setting's."""
    home.mkdir(parents=True, exist_ok=True)
    process = forge().Process(target=_serve, args=(str(home), environment(home, settings), "", port))
    process.start()
    process.join(60)
    process.kill()
    process.join(10)
    return process.exitcode, (home / "server.log").read_text(errors="replace")


def _serve(home: str, variables: Mapping[str, str], fault: str, port: int | None) -> None:
    log = os.open(Path(home) / "server.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(home)
    from server.__main__ import cli

    if fault in KILLS:
        _kill_at(Path(home) / "armed", *KILLS[fault])
    elif fault:
        _break(fault)
    sys.argv = ["server", "serve", *(() if port is None else ("--port", str(port)))]
    cli()


FAULTS: dict[str, Callable[[], object]] = {
    "slow": lambda: time.sleep(0.8),
    "hang": lambda: time.sleep(3600),
    "hold": lambda: ctypes.PyDLL(None).sleep(3600),  # with the interpreter's lock: nobody else runs
}


def _break(fault: str) -> None:
    from server.engine.engine import Engine

    embed, broken = Engine.embed, False

    def doomed(engine: Engine, images: Sequence[Any]) -> Any:
        nonlocal broken
        if any(image.min() == 255 for image in images):
            broken = fault == "fail"
            FAULTS.get(fault, int)()
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return embed(engine, images)

    Engine.embed = doomed  # type: ignore[method-assign]


KILLS = {  # where: module, name, and whether the step is taken before the end
    "a piece of an upload": ("server.datasets.upload_store", "Part.append", True),
    "unpacking": ("server.datasets.dataset_store", "DatasetStore._move_in", False),
    "a data set without its answer": ("server.datasets.dataset_store", "DatasetStore._keep", True),
    "an upload that has become a data set": ("server.datasets.upload_store", "UploadStore._become", False),
    "a version without its alias": ("prompts_store.file_store", "FileStore.put", True),
    "an alias that is about to move": ("prompts_store.file_store", "FileStore._save", False),
    "an alias that has moved": ("prompts_store.file_store", "FileStore._save", True),
    "a task that is being deleted": ("prompts_store.file_store", "FileStore._finish_deletion", False),
    "a job without its answer": ("server.jobs.sqlite_store", "SqliteJobStore.submit", True),
    "a picture without its word": ("server.datasets.feedback_store", "FeedbackStore._keep_picture", True),
    "a lens half written": ("server.engine.rack", "Rack.allocate", True),
    "an eviction": ("server.engine.rack", "Rack.free", True),
}


def _kill_at(armed: Path, module: str, name: str, taken: bool) -> None:
    owner_name, _, method = name.partition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    step = getattr(owner, method)

    def doomed(*arguments: Any, **options: Any) -> Any:
        if taken:
            answer = step(*arguments, **options)
        if armed.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return answer if taken else step(*arguments, **options)

    setattr(owner, method, doomed)
