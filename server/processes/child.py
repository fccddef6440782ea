"""Forks that the process manager keeps running."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from server.app.backoff import Backoff

PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
FIRST_PAUSE_S: Final = 0.1
NOT_STARTED: Final = 1  # the exit status of a process that could not start

SendReady = Callable[[str], None]


class ForkedProcess:
    """A fork of the manager. It runs `main`, which gets this object and a function to call once with a message when the
    process is ready, and exits with the status that `main` returns.

    `pid` is 0 while it does not run; `restart_at` is a time of `time.monotonic`; `pipe` is where the message comes
    from, -1 once it has been read.
    """

    def __init__(
        self, name: str, main: Callable[[ForkedProcess, SendReady], int], first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.name, self._main = name, main
        self.pid = 0
        self.started_at = 0.0
        self.restart_at = 0.0
        self.ends = 0  # how many times it has ended
        self.pipe = -1
        self.message = bytearray()
        self.ready = False
        self._backoff = Backoff(first_pause_s)

    @property
    def metrics_name(self) -> str:
        return f"{self.name}-{self.pid}"

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
        self.pid, self.ends, self.ready = 0, self.ends + 1, False
        self.restart_at = now + self._backoff.pause_s(lived_s)
        return lived_s

    def read_message(self) -> None:
        """Read what has come through the pipe. At its end the process is ready, if it has sent a message."""
        data = os.read(self.pipe, 1 << 16)
        self.message += data
        if not data:
            self.close_pipe()
            self.ready = bool(self.message)

    def close_pipe(self) -> None:
        """Close the manager's end of the pipe, if it is open."""
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


def show_name(name: str) -> None:
    """Have `ps` and `top` show this process by its name, of which they show 15 characters. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send the signal of a `number` to this process when `parent` ends, in whatever way. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended already
        os._exit(NOT_STARTED)


def _send(pipe: int, message: str) -> None:
    data = message.encode()
    while data:
        data = data[os.write(pipe, data) :]
    os.close(pipe)
