"""`python -m server serve`: the HTTP server, with its engines and its workers."""

from __future__ import annotations

import logging
from functools import partial
from typing import Annotated

import typer

from server.app import allocator
from server.engine.import_timm import import_timm
from server.settings import Settings

from .root import (
    load_settings,
    log_end,
    report_unknown_variables,
    require_tracing,
    start_logging,
    start_observability,
    starting,
)

log = logging.getLogger("server")


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (LENSRACK_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one (LENSRACK_PORT).")] = None,
) -> None:
    """Serve predictions and accept training jobs."""
    allocator.keep_one_heap()
    report_unknown_variables()
    settings = load_settings(host=host, port=port)
    if settings.fronts:
        start_logging(settings)
        require_tracing(settings)  # each process starts its own traces
    else:
        start_observability(settings, "lensrack-server")
    with starting("server"):
        status = _run(settings)
    if status:
        raise typer.Exit(status)


def _run(settings: Settings) -> int:
    """Serve until a signal comes, and return the exit status."""
    import_timm(hub=settings.downloads_weights)
    from server.app.stores import require_storage

    require_storage(settings)
    if settings.fronts:
        from server.processes.manager import ProcessManager

        status = ProcessManager(settings).run()
        log_end(status)
        return status
    from server.processes import http_server

    status = http_server.run(partial(_serve, settings))
    log_end(status)
    http_server.wait_for_threads(status)
    return status


async def _serve(settings: Settings) -> int:
    """Serve in this process, without front ends, and return the exit status."""
    from server.app.server import build_server
    from server.batching.watchdog import EXIT_CODE
    from server.processes import http_server

    listener = http_server.listen(settings)
    server = build_server(settings)

    def ready(http: http_server.HttpServer) -> None:
        log.info("serving on %s", http_server.url_of(listener))
        server.engine.watchdog.on_lost = lambda: setattr(http, "should_exit", True)

    await http_server.serve_http(server, listener, ready)
    return EXIT_CODE if server.engine.lost else 0
