"""The parent of a server in several processes: forks the engines' processes and the front ends, and keeps them there.

    House ─┬─ engine     one for each device; when it ends (killed, or lost: 70) it is forked anew, and fronts ask the
           │             others until it is back, or say 503 where there is none
           └─ front 0 …  all accept from one listening socket, so what waits there outlives any of them

It loads all code once and computes nothing, so that a fork is quick and shares that memory; no thread runs here.
Whatever ends this process ends all others: the kernel sees to it (PR_SET_PDEATHSIG). SIGTERM and SIGINT drain: front
ends first, as they need the engine to answer those who wait; a second one ends everything at once.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from server import __version__
from server.api.binding import require_safe_bind
from server.app.backbone import BackboneInfo
from server.app.backoff import Backoff
from server.app.stores import open_authenticator
from server.observability import logs, tracing
from server.observability.multiprocess import ProcessMetrics
from server.settings import Settings

from . import engine_process, front_process, http_server, runtime_dir

log = logging.getLogger("server")

PR_SET_PDEATHSIG: Final = 1
FIRST_PAUSE_S: Final = 0.1
MARGIN_S: Final = 8.0  # for what a process does besides draining
NOT_STARTED: Final = 1


@dataclass(eq=False)
class ChildProcess:
    """A process to be kept. `begun` is read until the child has said that it is ready."""

    name: str
    work: Callable[
        [Callable[[str], None], ProcessMetrics], int
    ]  # in the child: what it does until it ends with a status
    pid: int = 0
    begun: int = -1
    since: float = 0.0
    said: bytearray = field(default_factory=bytearray)
    ready: bool = False
    backoff: Backoff = field(default_factory=partial(Backoff, FIRST_PAUSE_S))
    again_at: float = 0.0  # when to fork it, while it has no pid

    @property
    def ledger_name(self) -> str:
        return f"{self.name}-{self.pid}"


class ProcessManager:
    """`run` returns when all have ended."""

    def __init__(self, settings: Settings) -> None:
        if not sys.platform.startswith("linux"):
            raise ValueError("LENSRACK_FRONTS: front ends of their own need Linux; expected 0 elsewhere")
        self._settings = settings
        self._listener: socket.socket
        self._folder: Path
        numbers = range(len(settings.engine_devices))
        name = "engine" if len(numbers) == 1 else "engine-{}"
        self._engines = [ChildProcess(name.format(n), partial(self._compute, number=n)) for n in numbers]
        self._fronts = [ChildProcess(f"front-{n}", partial(self._speak, first=n == 0)) for n in range(settings.fronts)]
        self._facts = ""
        self._asked_to_end = 0
        self._wake: socket.socket

    def run(self) -> int:
        """The exit status. Raises UnsafeBind, OSError, before anything is forked."""
        self._check()
        self._listener = http_server.listen(self._settings)
        gc.collect()
        gc.freeze()  # what all share is not to be copied because a collection has looked at it
        try:
            with runtime_dir.taken() as self._folder, self._signals():
                return self._keep()
        finally:
            gc.unfreeze()

    def _check(self) -> None:
        ring = open_authenticator(self._settings)
        try:
            require_safe_bind(self._settings, locked=ring.locked)
        finally:
            ring.close()

    # --- in the parent ----------------------------------------------------------------------------------------------

    def _keep(self) -> int:
        if not self._started(self._engines):
            return self._end(NOT_STARTED)
        if not self._started(self._fronts):
            return self._end(NOT_STARTED)
        log.info("serving on http://%s:%d", *self._listener.getsockname()[:2])
        while not self._asked_to_end:
            self._look_after(self._children())
        return self._end(0)

    def _children(self) -> list[ChildProcess]:
        return [*self._engines, *self._fronts]

    def _started(self, children: list[ChildProcess]) -> bool:
        """Whether all of them are ready. The first start is the only one that may fail for good."""
        for child in children:
            self._fork(child)
        while not all(child.ready for child in children):
            self._wait(None)
            if self._asked_to_end or not all(child.pid for child in self._children() if child.since):
                return False
        return True

    def _look_after(self, children: list[ChildProcess]) -> None:
        """Fork whoever has ended and whose pause is over; wait until something happens."""
        now = time.monotonic()
        for child in children:
            if not child.pid and child.again_at <= now:
                self._fork(child)
        pauses = [child.again_at - now for child in children if not child.pid]
        self._wait(max(0.0, min(pauses)) if pauses else None)

    def _wait(self, timeout_s: float | None) -> None:
        """For a signal, or for a child to say something."""
        speaking = {child.begun: child for child in self._children() if child.begun >= 0}
        readable, _, _ = select.select([self._wake.fileno(), *speaking], [], [], timeout_s)
        for one in readable:
            if one in speaking:
                self._hear(speaking[one])
            else:
                self._notice(self._wake.recv(4096))

    def _hear(self, child: ChildProcess) -> None:
        said = os.read(child.begun, 1 << 16)
        child.said += said
        if not said:
            os.close(child.begun)
            child.begun = -1
            child.ready = bool(child.said)
            if child is self._engines[0] and child.ready:
                self._facts = child.said.decode()

    def _notice(self, signals: bytes) -> None:
        for number in signals:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._asked_to_end += 1
        for child in self._children():
            if child.pid:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: ChildProcess, code: int) -> None:
        lived_s = time.monotonic() - child.since
        if not self._asked_to_end:
            log.error("%s (pid %d) ended with %d after %.1f s", child.name, child.pid, code, lived_s)
        ProcessMetrics(self._folder, "house").retire(child.ledger_name)
        child.pid, child.ready = 0, False
        child.again_at = time.monotonic() + child.backoff.pause_s(lived_s)

    def _end(self, status: int) -> int:
        """Front ends first: they still need the engines. While they drain nobody new is to wait at a door that stays
        shut: as long as one process has the socket, the kernel lets them."""
        self._listener.close()
        drain_s = self._settings.drain_timeout_s
        self._end_all(self._fronts, 2 * drain_s + MARGIN_S)
        self._end_all(self._engines, 2 * drain_s + MARGIN_S)
        return status

    def _end_all(self, children: list[ChildProcess], most_s: float) -> None:
        until, asked = time.monotonic() + most_s, max(1, self._asked_to_end)
        _send(children, signal.SIGTERM)
        while any(child.pid for child in children) and time.monotonic() < until and self._asked_to_end <= asked:
            self._wait(max(0.0, until - time.monotonic()))
        _send(children, signal.SIGKILL)
        while any(child.pid for child in children):
            self._wait(None)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals wake `_wait`, which reads which ones came."""
        self._wake, waking = socket.socketpair()
        with self._wake, waking:
            waking.setblocking(False)
            signal.set_wakeup_fd(waking.fileno())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, lambda *_: None)
            try:
                yield
            finally:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)

    # --- children ---------------------------------------------------------------------------------------------------

    def _fork(self, child: ChildProcess) -> None:
        reading, writing = os.pipe()
        parent, child.since, child.said = os.getpid(), time.monotonic(), bytearray()
        child.pid = os.fork()
        if child.pid:
            os.close(writing)
            child.begun = reading
            log.info("%s: pid %d", child.name, child.pid)
            return
        child.pid = os.getpid()
        os.close(reading)
        os._exit(self._live(child, parent, writing))

    def _live(self, child: ChildProcess, parent: int, writing: int) -> int:
        """In the child, to its end. Never returns by an exception."""
        try:
            _end_with(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to all: the parent decides
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if child in self._engines:
                self._listener.close()  # nobody connects to somebody who never accepts
            for other in self._children():
                if other.begun >= 0:
                    os.close(other.begun)
            return child.work(partial(_say, writing), ProcessMetrics(self._folder, child.ledger_name))
        except Exception as error:
            if _known(error):
                print(f"the server cannot start: {error}", file=sys.stderr, flush=True)
            else:
                log.exception("%s failed", child.name)
            return NOT_STARTED
        except BaseException:
            return NOT_STARTED
        finally:
            tracing.stop()
            logging.shutdown()

    def _compute(self, ready: Callable[[str], None], ledger: ProcessMetrics, *, number: int) -> int:
        self._tell("lensrack-engine")

        async def work() -> int:
            return await engine_process.EngineProcess(self._settings, self._folder, ledger, number).run(ready)

        return _left(http_server.run(work))

    def _speak(self, ready: Callable[[str], None], ledger: ProcessMetrics, *, first: bool) -> int:
        self._tell("lensrack-server")

        async def work() -> int:
            facts = BackboneInfo.from_json(self._facts).on(self._settings.engine_devices)
            front = front_process.build_front(self._settings, facts, self._folder, ledger, first=first)
            await http_server.serve_http(front, self._listener, lambda _: ready("ready"))
            return 0

        return _left(http_server.run(work))

    def _tell(self, service: str) -> None:
        settings = self._settings
        logs.start(settings.log_level, settings.log_format)
        if settings.otlp_endpoint:
            tracing.start(settings.otlp_endpoint, service=service, version=__version__, ratio=settings.trace_ratio)


def _send(children: list[ChildProcess], number: signal.Signals) -> None:
    for child in children:
        if child.pid:
            os.kill(child.pid, number)


def _left(status: int) -> int:
    http_server.wait_for_threads(status)
    return status


def _say(descriptor: int, text: str) -> None:
    """What the parent waits for; nothing more is said."""
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]
    os.close(descriptor)


def _known(error: Exception) -> bool:
    from prompts_store import StoreError
    from server.engine.backbone import BackboneError
    from server.errors import ServiceError

    return isinstance(error, BackboneError | StoreError | ServiceError | tracing.NotInstalled | ValueError | OSError)


def _end_with(parent: int) -> None:
    """However that process ends, this one is killed then."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(NOT_STARTED)
