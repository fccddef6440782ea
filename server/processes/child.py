"""Processes that the process manager keeps running: forks of it, and workers, which are programs of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from server.app.backoff import Backoff
from server.app.worker_pool import FIRST_PAUSE_S as FIRST_WORKER_PAUSE_S
from server.app.worker_pool import WorkerProgram, start_worker
from server.settings import Settings

PR_SET_PDEATHSIG: Final = 1
FIRST_PAUSE_S: Final = 0.1
NOT_STARTED: Final = 1  # the exit status of a process that could not start

SendReady = Callable[[str], None]


class ChildProcess:
    """A process to keep running. `pid` is 0 while it does not run; `restart_at` is a time of `time.monotonic`."""

    def __init__(self, name: str, first_pause_s: float) -> None:
        self.name = name
        self.pid = 0
        self.started_at = 0.0
        self.restart_at = 0.0
        self.ends = 0  # how many times it has ended
        self._backoff = Backoff(first_pause_s)

    def start(self) -> None:
        """Start the process. Raises OSError."""
        self.started_at = time.monotonic()
        self.pid = self._launch()

    def poll(self) -> int | None:
        """Return the exit status of a process that has ended, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def schedule_restart(self) -> float:
        """Note that the process has ended, set `restart_at`, and return how many seconds it lived."""
        now = time.monotonic()
        lived_s = now - self.started_at
        self.pid, self.ends = 0, self.ends + 1
        self.restart_at = now + self._backoff.pause_s(lived_s)
        return lived_s

    def close_pipe(self) -> None:
        """Close the manager's end of the pipe to this process, if there is one."""

    def _launch(self) -> int:
        raise NotImplementedError


class ForkedProcess(ChildProcess):
    """A fork of the manager. It runs `main`, which gets this object and a function to call once with a message when the
    process is ready, and exits with the status that `main` returns."""

    def __init__(self, name: str, main: Callable[[ForkedProcess, SendReady], int]) -> None:
        super().__init__(name, FIRST_PAUSE_S)
        self._main = main
        self.pipe = -1  # where the message comes from, -1 once it has been read
        self.message = bytearray()
        self.ready = False

    @property
    def metrics_name(self) -> str:
        return f"{self.name}-{self.pid}"

    def read_message(self) -> None:
        """Read what has come through the pipe. At its end the process is ready, if it has sent a message."""
        data = os.read(self.pipe, 1 << 16)
        self.message += data
        if not data:
            self.close_pipe()
            self.ready = bool(self.message)

    def schedule_restart(self) -> float:
        self.ready = False
        return super().schedule_restart()

    def close_pipe(self) -> None:
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def _launch(self) -> int:
        self.message.clear()
        self.pipe, sending = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(sending)
            self.close_pipe()
            raise
        if pid:
            os.close(sending)
            return pid
        status = NOT_STARTED
        try:
            self.pid = os.getpid()
            self.close_pipe()
            status = self._main(self, partial(_send, sending))
        finally:
            os._exit(status)


class WorkerProcess(ChildProcess):
    """The program `python -m server work` of a `number`, from 0.

    It gives its job back to the queue and leaves when the manager ends: the kernel sends it SIGTERM, and its standard
    input, a pipe from the manager, closes.
    """

    def __init__(self, settings: Settings, number: int) -> None:
        super().__init__(f"worker-{number}", FIRST_WORKER_PAUSE_S)
        self._settings, self._number = settings, number
        self._program: WorkerProgram

    def poll(self) -> int | None:
        status = self._program.poll()
        if status is not None:
            self.close_pipe()
        return status

    def close_pipe(self) -> None:
        if self.pid and self._program.stdin is not None:
            self._program.stdin.close()

    def _launch(self) -> int:
        self._program = start_worker(self._settings, self._number, preexec=partial(_prepare_worker, os.getpid()))
        return self._program.pid


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send the signal of a `number` to this process when `parent` ends, in whatever way. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended already
        os._exit(NOT_STARTED)


def _prepare_worker(parent: int) -> None:
    """In the worker, between fork and exec."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the manager ends the worker
    end_with_parent(parent, signal.SIGTERM)


def _send(pipe: int, message: str) -> None:
    data = message.encode()
    while data:
        data = data[os.write(pipe, data) :]
    os.close(pipe)
