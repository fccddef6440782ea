"""`python -m server work`: a worker that fits training jobs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Annotated, Final

import typer

from server.app import allocator
from server.engine.import_timm import import_timm
from server.observability import tracing

from .root import load_settings, report_unknown_variables, start_observability, starting

log = logging.getLogger("server")

ORPHAN_S: Final = 10.0  # for which a worker may go on without its server: its job goes back to the queue


def work(
    until_stdin_closes: Annotated[bool, typer.Option(help="Stop when the process that started this one ends.")] = False,
) -> None:
    """Fit queued training jobs, until it is stopped."""
    stop, ready = threading.Event(), threading.Event()
    if until_stdin_closes:  # before anything that takes time
        threading.Thread(target=leave_with_parent, args=(stop, ready, ORPHAN_S), daemon=True).start()
    allocator.keep_one_heap()
    if not until_stdin_closes:  # else the server has reported them
        report_unknown_variables()
    settings = load_settings()
    start_observability(settings, "lensrack-worker")
    with starting("worker"):
        import_timm(hub=settings.downloads_weights)
        from server.app.worker import run_worker

        ready.set()
        status = run_worker(settings, stop, of_terminal=not until_stdin_closes)
    tracing.stop()
    logging.shutdown()
    os._exit(status)  # all is written, and the libraries take seconds to take themselves down


def leave_with_parent(stop: threading.Event, ready: threading.Event, grace_s: float) -> None:
    """Set `stop` when standard input closes, and kill this process `grace_s` later if it still runs; a worker that is
    not `ready` has no job, and ends at once.

    Standard input is a pipe from the server: it closes when the server ends, in whatever way.
    """
    while os.read(0, 1024):
        pass
    if not ready.is_set():
        os._exit(0)
    stop.set()
    time.sleep(grace_s)
    log.warning("the worker has not left within %.0f s and is killed", grace_s)
    os.kill(os.getpid(), signal.SIGKILL)
