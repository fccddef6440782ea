"""`python -m server serve`: the HTTP server, with its engines and its workers."""

from __future__ import annotations

import logging
from functools import partial
from typing import Annotated

import typer

from prompts_store import StoreError
from server.app import allocator
from server.engine.import_timm import import_timm
from server.settings import Settings

from .root import load_settings, require_tracing, start_logging, start_observability

log = logging.getLogger("server")


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (LENSRACK_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one (LENSRACK_PORT).")] = None,
) -> None:
    """Serve predictions and accept training jobs."""
    allocator.keep_one_heap()
    settings = load_settings(host=host, port=port)
    if settings.fronts:
        start_logging(settings)
        require_tracing(settings)  # each process starts its own traces
    else:
        start_observability(settings, "lensrack-server")
    import_timm(hub=settings.downloads_weights)
    from server.engine.backbone import BackboneError
    from server.errors import ServiceError

    try:
        if settings.fronts:
            from server.processes.manager import ProcessManager

            status = ProcessManager(settings).run()
        else:
            from server.processes import http_server

            status = http_server.run(partial(_serve, settings))
            http_server.wait_for_threads(status)
    except (BackboneError, StoreError, ServiceError, ValueError, OSError) as error:
        typer.echo(f"the server cannot start: {error}", err=True)
        raise typer.Exit(1) from None
    if status:
        raise typer.Exit(status)


async def _serve(settings: Settings) -> int:
    """Serve in this process, without front ends, and return the exit status."""
    from server.app.server import build_server
    from server.batching.watchdog import EXIT_CODE
    from server.processes import http_server

    listener = http_server.listen(settings)
    server = build_server(settings)

    def ready(http: http_server.HttpServer) -> None:
        log.info("serving on http://%s:%d", *listener.getsockname()[:2])
        server.engine.watchdog.on_lost = lambda: setattr(http, "should_exit", True)

    await http_server.serve_http(server, listener, ready)
    return EXIT_CODE if server.engine.lost else 0
