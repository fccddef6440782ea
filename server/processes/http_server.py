"""HTTP in this process until a signal ends it: the same for a server in one process and for a front end."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
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

from . import INTERRUPTED

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
    """Return the listening socket. Raises OSError, with the setting to change, for example where the port is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(_listen_failure(settings, error)) from error
    # asyncio sets it only where a socket names its protocol; without it an answer waits 40 ms for the client's ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen_failure(settings: Settings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"LENSRACK_PORT: expected a free port, got {settings.port}, which is in use at {settings.host}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"LENSRACK_PORT: expected a port that this user may open, got {settings.port} (try one above 1023)"
    expected = "expected an address of this machine"
    return f"LENSRACK_HOST: {expected}, got {settings.host!r} ({error.strerror or type(error).__name__})"


def run(work: Callable[[], Awaitable[int]]) -> int:
    """Run `work` on a new event loop and return its exit status, without waiting for the loop's threads."""

    async def main() -> int:
        asyncio.get_running_loop().set_default_executor(_UnawaitedThreads(thread_name_prefix="asyncio"))
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class HttpServer(uvicorn.Server):
    """uvicorn that does not raise a signal again after the shutdown, as it would end us before the workers stop."""

    def __init__(self, server: ServedApp, signals: Sequence[signal.Signals]) -> None:
        settings, self._server = server.settings, server
        self._numbers, self._signals = signals, 0
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
        for number in self._numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        """Drain and end; at a second signal end at once."""
        self._signals += 1
        if self._signals > 1:
            log.warning("stopped at once, by a second signal")
            logging.shutdown()
            os._exit(INTERRUPTED)
        if signal.SIGINT in self._numbers:  # else the process manager has said so
            log.info("stopping; again (Ctrl-C) to stop at once")
        super().handle_exit(number, frame)
        self._server.leave()


async def serve_http(
    server: ServedApp,
    listener: socket.socket,
    ready: Callable[[HttpServer], None],
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> None:
    """Serve until one of the signals comes. `ready` is called when requests can be answered."""
    async with server.running():
        http = HttpServer(server, signals)
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
