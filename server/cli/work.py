"""`python -m server work`: a worker that fits training jobs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from prometheus_client import start_http_server

from server.app import allocator
from server.engine.import_timm import import_timm
from server.observability import metrics
from server.processes import INTERRUPTED
from server.settings import Settings

from .root import load_settings, report_unknown_variables, start_observability, starting

if TYPE_CHECKING:
    from server.worker.trainer import Trainer

log = logging.getLogger("server")


def work(
    until_stdin_closes: Annotated[bool, typer.Option(help="Stop when the process that started this one ends.")] = False,
) -> None:
    """Fit queued training jobs, until it is stopped."""
    allocator.keep_one_heap()
    if not until_stdin_closes:  # else the server has reported them
        report_unknown_variables()
    settings = load_settings()
    start_observability(settings, "lensrack-worker")
    with starting("worker"):
        trainer = _trainer(settings)

    def stop(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and trainer.stop.is_set():
            log.warning("stopped at once, by a second signal; the lease of a running job ends by itself")
            os._exit(INTERRUPTED)
        trainer.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN if until_stdin_closes else stop)  # the server gets it too, and decides
    if until_stdin_closes:
        leaving = (trainer.stop, settings.drain_timeout_s)
        threading.Thread(target=leave_with_parent, args=leaving, daemon=True).start()
    log.info("worker ready, pid %d", os.getpid())
    trainer.run()
    log.info("worker stopped, pid %d", os.getpid())


def _trainer(settings: Settings) -> Trainer:
    import_timm(hub=settings.downloads_weights)
    from server.app.stores import require_storage
    from server.app.worker import build_worker

    os.nice(settings.worker_nice)
    require_storage(settings)
    trainer = build_worker(settings, name=f"{socket.gethostname()}-{os.getpid()}")
    if settings.worker_metrics_port:
        try:
            start_http_server(settings.worker_metrics_port, settings.worker_metrics_host, metrics.REGISTRY)
        except OSError as error:
            place = f"{settings.worker_metrics_port} at {settings.worker_metrics_host}"
            expected = "LENSRACK_WORKER_METRICS_PORT: expected a free port"
            raise OSError(f"{expected}, got {place}: {error.strerror}") from error
    return trainer


def leave_with_parent(stop: threading.Event, grace_s: float) -> None:
    """Set `stop` when standard input closes, and kill this process `grace_s` later if it still runs.

    Standard input is a pipe from the server: it closes when the server ends, in whatever way.
    """
    while os.read(0, 1024):
        pass
    stop.set()
    time.sleep(grace_s)
    log.warning("the worker has not left within %.0f s and is killed", grace_s)
    os.kill(os.getpid(), signal.SIGKILL)
