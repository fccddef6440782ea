"""The parent of a server in several processes: starts engines, workers and front ends, and restarts those that end.

    ProcessManager ─┬─ engine     a fork for each device. When it ends (killed, or lost: status 70) it is restarted;
                    │             until then front ends use the other engines, or answer 503 where there is none
                    ├─ worker-0 … forks that fit jobs and need no engine
                    └─ front-0 …  forks that accept from one listening socket, so waiting connections outlive each fork

The manager loads all code once and computes nothing, so a fork is quick and shares its memory; it runs no thread.
A fork that gives no sign of life for LENSRACK_STUCK_S (`heartbeats`) is killed, and restarted like one that ended.
However the manager ends, the kernel (PR_SET_PDEATHSIG) kills engines and front ends and has workers leave. SIGTERM and
SIGINT drain: front ends first, as they need the engines to answer waiting requests, then workers, whose jobs go back
to the queue, then engines. A second signal ends them at once.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from server import __version__
from server.api.binding import require_safe_bind
from server.app.backbone import BackboneInfo
from server.app.stores import open_authenticator
from server.app.worker_pool import FIRST_PAUSE_S as WORKER_PAUSE_S
from server.observability import logs, tracing
from server.observability.multiprocess import ProcessMetrics
from server.settings import Settings

from . import INTERRUPTED, engine_process, front_process, http_server, runtime_dir
from .child import FIRST_PAUSE_S, NOT_STARTED, ForkedProcess, SendReady, end_with_parent, show_name
from .heartbeats import Heartbeats
from .worker_metrics import MANAGER, WorkerMetrics

log = logging.getLogger("server")

MARGIN_S: Final = 8.0  # for what a process does besides draining
LOOK_S: Final = 1.0  # between looks at the forks' signs of life

Work = Callable[[SendReady, ProcessMetrics], int]  # what a fork does until it exits with a status


class ProcessManager:
    """`run` returns when all processes have ended."""

    def __init__(self, settings: Settings) -> None:
        if not sys.platform.startswith("linux"):
            raise ValueError("LENSRACK_FRONTS: front ends of their own need Linux; expected 0 elsewhere")
        self._settings = settings
        self._pid = os.getpid()
        self._listener: socket.socket
        self._folder: Path
        self._wake: socket.socket
        self._worker_metrics: WorkerMetrics
        self._heartbeat_number: int  # in a fork, its own
        self._engines = [
            self._forked("engine" if len(settings.engine_devices) == 1 else f"engine-{n}", self._run_engine, number=n)
            for n in range(len(settings.engine_devices))
        ]
        self._workers = [
            self._forked(f"worker-{n}", self._run_worker, WORKER_PAUSE_S, number=n) for n in range(settings.workers)
        ]
        self._fronts = [self._forked(f"front-{n}", self._run_front, first=n == 0) for n in range(settings.fronts)]
        self._heartbeats = Heartbeats(len(self._forks))
        self._looked_at = self._trusted_from = 0.0
        self._backbone_json = ""
        self._stop_signals = 0

    def _forked(
        self, name: str, work: Callable[..., int], first_pause_s: float = FIRST_PAUSE_S, **options: int
    ) -> ForkedProcess:
        return ForkedProcess(name, partial(self._run_child, partial(work, **options)), first_pause_s)

    def run(self) -> int:
        """Return the exit status. Raises UnsafeBind, OSError, before anything is forked."""
        self._check_binding()
        self._listener = http_server.listen(self._settings)
        gc.collect()
        gc.freeze()  # shared pages are not to be copied because a collection has visited them
        try:
            with runtime_dir.create() as self._folder, self._signals():
                return self._supervise()
        finally:
            gc.unfreeze()

    def _check_binding(self) -> None:
        authenticator = open_authenticator(self._settings)
        try:
            require_safe_bind(self._settings, locked=authenticator.locked)
        finally:
            authenticator.close()

    # --- in the parent ----------------------------------------------------------------------------------------------

    def _supervise(self) -> int:
        self._worker_metrics = WorkerMetrics(self._workers, self._folder)
        if not self._start_all(self._engines):
            return self._end()
        self._start_workers()
        if not self._start_all(self._fronts):
            return self._end()
        log.info("serving on %s", http_server.url_of(self._listener))
        while not self._stop_signals:
            self._wait(min(LOOK_S, self._restart_ended()))
            self._kill_stuck()
        log.info("stopping; again (Ctrl-C) to stop at once")
        return self._end()

    @property
    def _forks(self) -> list[ForkedProcess]:
        """Those that requests need."""
        return [*self._engines, *self._fronts]

    @property
    def _children(self) -> list[ForkedProcess]:
        return [*self._engines, *self._workers, *self._fronts]

    def _start_all(self, forks: Sequence[ForkedProcess]) -> bool:
        """Start these and return whether all became ready: at the first start a fork that ends is not restarted."""
        for child in forks:
            self._start(child)
        while not all(child.ready for child in forks):
            self._wait(None)
            if self._stop_signals or any(child.ends for child in self._forks):
                return False
        return True

    def _start_workers(self) -> None:
        for worker in self._workers:
            self._start(worker)
        self._worker_metrics.write()  # before a front end reports them

    def _kill_stuck(self) -> None:
        """Kill forks that give no sign of life. After a time in which the manager stood still as well (a suspended
        terminal, a paused machine) they first get time to give one."""
        now, limit_s = time.monotonic(), self._settings.stuck_s
        if now - self._looked_at > 5 * LOOK_S:
            self._trusted_from = now + limit_s
        self._looked_at = now
        if now < self._trusted_from:
            return
        for number, fork in enumerate(self._forks):
            if fork.pid and fork.ready and (age_s := self._heartbeats.age_s(number)) > limit_s:
                log.error("%s (pid %d) has given no sign of life for %.0f s and is killed", fork.name, fork.pid, age_s)
                fork.ready = False  # once is enough
                os.kill(fork.pid, signal.SIGKILL)

    def _restart_ended(self) -> float:
        """Start what does not run and has paused; return the seconds until the next restart, inf where all run."""
        now = time.monotonic()
        for child in self._children:
            if not child.pid and child.restart_at <= now:
                self._start(child)
        self._worker_metrics.write()
        pauses = [child.restart_at - now for child in self._children if not child.pid]
        return max(0.0, min(pauses, default=math.inf))

    def _start(self, child: ForkedProcess) -> None:
        try:
            child.start()
            log.info("%s: pid %d", child.name, child.pid)
        except OSError as error:
            log.error("%s could not be started: %s", child.name, error)
            child.schedule_restart()

    def _wait(self, timeout_s: float | None) -> None:
        """Wait for a signal or for a message of a fork, and handle it."""
        forks = {child.pipe: child for child in self._children if child.pipe >= 0}
        readable, _, _ = select.select([self._wake.fileno(), *forks], [], [], timeout_s)
        for descriptor in readable:
            if descriptor in forks:
                self._read_message(forks[descriptor])
            else:
                self._handle_signals(self._wake.recv(4096))

    def _read_message(self, child: ForkedProcess) -> None:
        child.read_message()
        if child is self._engines[0] and child.ready:
            self._backbone_json = child.message.decode()

    def _handle_signals(self, numbers: bytes) -> None:
        self._stop_signals += sum(number in (signal.SIGTERM, signal.SIGINT) for number in numbers)
        for child in self._children:
            if child.pid and (status := child.poll()) is not None:
                self._handle_end(child, status)

    def _handle_end(self, child: ForkedProcess, status: int) -> None:
        pid = child.pid
        if child not in self._workers:
            self._retire_metrics(child)
        lived_s = child.schedule_restart()
        if not self._stop_signals:
            log.error("%s (pid %d) ended with %d after %.1f s", child.name, pid, status, lived_s)

    def _retire_metrics(self, child: ForkedProcess) -> None:
        try:
            ProcessMetrics(self._folder, MANAGER).retire(child.metrics_name)
        except OSError as error:  # the disk is full
            log.warning("the counts of %s are lost: %s", child.name, error)

    def _end(self) -> int:
        """End all processes and return the exit status: of a server that could not start, that a second signal ended at
        once, or 0.

        The listener is closed first: as long as one process has the socket, the kernel accepts connections, and the
        front ends that drain accept no more of them.
        """
        self._listener.close()
        drain_s = self._settings.drain_timeout_s
        status = 0 if self._stop_signals else NOT_STARTED
        self._end_all(self._fronts, 2 * drain_s + MARGIN_S)
        self._end_all(self._workers, drain_s)
        self._end_all(self._engines, 2 * drain_s + MARGIN_S)
        return INTERRUPTED if self._in_haste else status

    @property
    def _in_haste(self) -> bool:
        """Whether another signal has come while the processes end."""
        return self._stop_signals > 1

    def _end_all(self, children: Sequence[ForkedProcess], timeout_s: float) -> None:
        """Send SIGTERM, and SIGKILL after `timeout_s` or at the second signal, whichever group was ending then."""
        end_at = time.monotonic() + timeout_s
        _send_signal(children, signal.SIGTERM)
        while any(child.pid for child in children) and time.monotonic() < end_at and not self._in_haste:
            self._wait(max(0.0, end_at - time.monotonic()))
        for child in children:
            if child.pid and not self._in_haste:
                log.warning("%s (pid %d) has not ended and is killed", child.name, child.pid)
        _send_signal(children, signal.SIGKILL)
        while any(child.pid for child in children):
            self._wait(None)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals wake `_wait`, which reads their numbers."""
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

    # --- in a fork --------------------------------------------------------------------------------------------------

    def _run_child(self, work: Work, child: ForkedProcess, send_ready: SendReady) -> int:
        """Do the work and return the exit status, also where an exception ends it."""
        try:
            if child in self._forks:
                self._heartbeat_number = self._forks.index(child)
                self._heartbeats.beat(self._heartbeat_number)
            self._prepare_fork(child)
            return work(send_ready, ProcessMetrics(self._folder, child.metrics_name))
        except Exception as error:
            if _is_expected(error):
                program = "worker" if child in self._workers else "server"
                print(f"the {program} cannot start: {error}", file=sys.stderr, flush=True)
            else:
                log.exception("%s failed", child.name)
            return NOT_STARTED
        except BaseException:
            return NOT_STARTED
        finally:
            tracing.stop()
            logging.shutdown()

    def _prepare_fork(self, child: ForkedProcess) -> None:
        """Let go of what is the manager's."""
        show_name(child.name)
        end_with_parent(self._pid, signal.SIGTERM if child in self._workers else signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the manager decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if child not in self._fronts:
            self._listener.close()  # only these accept
        for other in self._children:
            other.close_pipe()

    def _run_engine(self, send_ready: SendReady, process_metrics: ProcessMetrics, *, number: int) -> int:
        self._start_telemetry("lensrack-engine")

        async def work() -> int:
            process = engine_process.EngineProcess(self._settings, self._folder, process_metrics, number)
            async with self._heartbeats.beating(self._heartbeat_number):
                return await process.run(send_ready)

        return _finish(http_server.run(work))

    def _run_worker(self, send_ready: SendReady, _: ProcessMetrics, *, number: int) -> int:
        self._start_telemetry("lensrack-worker")
        send_ready("started")  # nobody waits for a worker
        from server.app.worker import run_worker

        settings = self._settings.model_copy(update={"worker_metrics_port": self._settings.metrics_port_of(number)})
        return run_worker(settings, give_up_s=settings.drain_timeout_s)

    def _run_front(self, send_ready: SendReady, process_metrics: ProcessMetrics, *, first: bool) -> int:
        self._start_telemetry("lensrack-server")

        async def work() -> int:
            backbone = BackboneInfo.from_json(self._backbone_json).on(self._settings.engine_devices)
            front = front_process.build_front(self._settings, backbone, self._folder, process_metrics, first=first)
            sent_by_manager = (signal.SIGTERM,)  # a terminal sends SIGINT to all processes
            async with self._heartbeats.beating(self._heartbeat_number):
                await http_server.serve_http(front, self._listener, lambda _: send_ready("ready"), sent_by_manager)
            return 0

        return _finish(http_server.run(work))

    def _start_telemetry(self, service: str) -> None:
        settings = self._settings
        logs.start(settings.log_level, settings.log_format, requests=settings.log_requests)
        if settings.otlp_endpoint:
            tracing.start(settings.otlp_endpoint, service=service, version=__version__, ratio=settings.trace_ratio)


def _send_signal(children: Sequence[ForkedProcess], number: signal.Signals) -> None:
    for child in children:
        if child.pid:
            os.kill(child.pid, number)


def _finish(status: int) -> int:
    http_server.wait_for_threads(status)
    return status


def _is_expected(error: Exception) -> bool:
    """Whether the error's message says enough: a wrong setting, or a store or a file that cannot be used."""
    from prompts_store import StoreError
    from server.engine.backbone import BackboneError
    from server.errors import ServiceError

    return isinstance(error, BackboneError | StoreError | ServiceError | tracing.NotInstalled | ValueError | OSError)
