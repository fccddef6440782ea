"""Serving HTTP in this process, and leaving it: what a whole server and a front end have in common."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from types import FrameType
from typing import Protocol

import uvicorn
import uvloop
from fastapi import FastAPI

from server.api.middleware.connections import limited, with_files_for
from server.observability import tracing
from server.settings import Settings

log = logging.getLogger("server")

LEAVE_S = 1.0
KEEP_ALIVE_S = 75  # longer than clients and proxies keep a silent connection (httpx 5 s, nginx and AWS 60 s): whoever
# closes first, while the other is just about to use it, breaks a request, and only its sender can know not to


class ServedApp(Protocol):
    """What is served: a `server.app.server.Server`, whole or a front end."""

    settings: Settings
    app: FastAPI

    def running(self) -> AbstractAsyncContextManager[None]: ...
    def leave(self) -> None: ...


def listen(settings: Settings) -> socket.socket:
    """A taken port is known at once. Raises OSError."""
    listener = socket.create_server((settings.host, settings.port), backlog=1024)
    # asyncio does this only for sockets that name their protocol; without it an answer waits 40 ms for the client's ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run(work: Callable[[], Awaitable[int]]) -> int:
    """On an event loop of its own, whose threads are not waited for."""

    async def main() -> int:
        asyncio.get_running_loop().set_default_executor(_UnawaitedThreads(thread_name_prefix="asyncio"))
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class HttpServer(uvicorn.Server):
    """uvicorn's own way raises the signal again afterwards and so would end us before the workers are stopped."""

    def __init__(self, server: ServedApp) -> None:
        settings, self._server = server.settings, server
        config = uvicorn.Config(
            server.app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s) + 1,  # who is told off by a drain hears it
            http=limited(with_files_for(settings.max_connections), settings.body_timeout_s),
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        super().handle_exit(number, frame)
        self._server.leave()


async def serve_http(server: ServedApp, listener: socket.socket, ready: Callable[[HttpServer], None]) -> None:
    """Until a signal comes; `ready` is called when requests can be answered."""
    async with server.running():
        front = HttpServer(server)
        gc.collect()
        gc.freeze()  # what is there now stays: a collection amid thousands of requests need not look at it
        ready(front)
        try:
            await front.serve(sockets=[listener])
        finally:
            gc.unfreeze()  # extensions that look at the end for what has leaked would take it for that


class _UnawaitedThreads(ThreadPoolExecutor):
    """Those of `asyncio.to_thread`, without asyncio's waiting for one that hangs in a store: see `wait_for_threads`."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def wait_for_threads(status: int) -> None:
    """Where a thread is still at something (an engine, a store that hangs), end the process without waiting for it."""
    until = time.monotonic() + LEAVE_S
    while busy := [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]:
        if time.monotonic() > until:
            log.warning("left while %d threads were at something: %s", len(busy), ", ".join(one.name for one in busy))
            tracing.stop()
            logging.shutdown()
            os._exit(status)
        time.sleep(0.02)
