"""`python -m server work`: a worker that fits training jobs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Annotated

import typer
from prometheus_client import start_http_server

from prompts_store import StoreError
from server.app import allocator
from server.engine.import_timm import import_timm
from server.observability import metrics

from .root import load_settings, start_observability

log = logging.getLogger("server")


def work(
    until_stdin_closes: Annotated[bool, typer.Option(help="Stop when the process that started this one ends.")] = False,
) -> None:
    """Fit queued training jobs, until it is stopped."""
    allocator.keep_one_heap()
    settings = load_settings(warn=not until_stdin_closes)  # else the server has warned already
    start_observability(settings, "lensrack-worker")
    import_timm(hub=settings.downloads_weights)
    from server.app.worker import build_worker
    from server.engine.backbone import BackboneError
    from server.errors import ServiceError

    os.nice(settings.worker_nice)
    try:
        trainer = build_worker(settings, name=f"{socket.gethostname()}-{os.getpid()}")
        if settings.worker_metrics_port:
            start_http_server(settings.worker_metrics_port, settings.worker_metrics_host, metrics.REGISTRY)
    except (BackboneError, StoreError, ServiceError, ValueError, OSError) as error:
        typer.echo(f"the worker cannot start: {error}", err=True)
        raise typer.Exit(1) from None

    def stop(_signal: int, _frame: FrameType | None) -> None:
        trainer.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if until_stdin_closes:
        leaving = (trainer.stop, settings.drain_timeout_s)
        threading.Thread(target=leave_with_parent, args=leaving, daemon=True).start()
    log.info("worker ready, pid %d", os.getpid())
    trainer.run()


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
