"""HTTP in this process until a signal ends it: the same for a server in one process and for a front end."""

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

LEAVE_S = 1.0  # longest wait for threads at the end
KEEP_ALIVE_S = 75  # longer than clients and proxies keep an idle connection (httpx 5 s, nginx and AWS 60 s): the side
# that closes it while the other is about to use it breaks a request, and only the client can avoid that


class ServedApp(Protocol):
    """A `server.app.server.Server`, in one process or as a front end."""

    settings: Settings
    app: FastAPI

    def running(self) -> AbstractAsyncContextManager[None]: ...
    def leave(self) -> None: ...


def listen(settings: Settings) -> socket.socket:
    """Return the listening socket. Raises OSError, for example where the port is taken."""
    listener = socket.create_server((settings.host, settings.port), backlog=1024)
    # asyncio sets it only where a socket names its protocol; without it an answer waits 40 ms for the client's ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run(work: Callable[[], Awaitable[int]]) -> int:
    """Run `work` on a new event loop and return its exit status, without waiting for the loop's threads."""

    async def main() -> int:
        asyncio.get_running_loop().set_default_executor(_UnawaitedThreads(thread_name_prefix="asyncio"))
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class HttpServer(uvicorn.Server):
    """uvicorn that does not raise a signal again after the shutdown, as it would end us before the workers stop."""

    def __init__(self, server: ServedApp) -> None:
        settings, self._server = server.settings, server
        config = uvicorn.Config(
            server.app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s) + 1,  # refusals of a drain still go out
            http=limited(with_files_for(settings.max_connections), settings.body_timeout_s, settings.trusted_proxies),
            forwarded_allow_ips=settings.trusted_proxies,
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
    """Serve until a signal comes. `ready` is called when requests can be answered."""
    async with server.running():
        http = HttpServer(server)
        gc.collect()
        gc.freeze()  # what exists now stays: no collection among thousands of requests need visit it
        ready(http)
        try:
            await http.serve(sockets=[listener])
        finally:
            gc.unfreeze()  # extensions that search for leaks at the exit would report frozen objects


class _UnawaitedThreads(ThreadPoolExecutor):
    """The threads of `asyncio.to_thread`. asyncio would wait for one that hangs in a store: see `wait_for_threads`."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


def wait_for_threads(status: int) -> None:
    """Wait for all threads. Exit with `status` where one still runs after a second (an engine or a store hangs)."""
    end_at = time.monotonic() + LEAVE_S
    while busy := [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]:
        if time.monotonic() > end_at:
            log.warning("exit while %d threads still run: %s", len(busy), ", ".join(thread.name for thread in busy))
            tracing.stop()
            logging.shutdown()
            os._exit(status)
        time.sleep(0.02)
