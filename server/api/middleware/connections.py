"""Connections: how many may be open, and how long one may be silent before it has asked anything.

    up to `most`      served
    RESERVED more     probes (`PROBES`) are answered, everybody else is told 503 too_many_connections: see `door`
    beyond these      told the same, without being read, and hung up on

A crowd whose questions are not answered in time opens ever more of them, and each costs memory and a file.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CROWDED: Final = "crowded"  # in the state of a request that came by one connection too many
PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
RETRY_S: Final = 1.0
RESERVED: Final = 64
LINGER_S: Final = 1.0  # a connection that is closed with something unread would take the answer along
OWN_FILES: Final = 256  # that a server opens for anything but connections
_BODY: Final = b'{"type":"about:blank","title":"Service Unavailable","status":503,"code":"too_many_connections",\
"detail":"too many connections are open"}'
TOLD: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: %d\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (RETRY_S, len(_BODY), _BODY)
)


def with_files_for(most: int) -> int:
    """Raise the process's limit of open files as far as it may be; how many connections these are enough for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + RESERVED + OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(most, soft - RESERVED - OWN_FILES))
    return most


def limited(most: int, silence_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol for at most so many connections; `silence_s`: the longest the head of a request may take."""

    class Limited(_Limited):
        pass

    Limited.most, Limited.silence_s = most, silence_s
    return Limited


class _Limited(HttpToolsProtocol):
    most = 0
    silence_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._away = len(self.connections) > self.most + RESERVED
        self._impatient: asyncio.TimerHandle | None = None
        if self._away:
            self._turn_away()
            return
        self._wait()
        if len(self.connections) > self.most:
            self.app_state = {**self.app_state, CROWDED: True}

    def data_received(self, data: bytes) -> None:
        if not self._away:
            super().data_received(data)

    def on_message_begin(self) -> None:
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._stop_waiting()
        super().shutdown()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _turn_away(self) -> None:
        self.transport.write(TOLD)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._impatient = self.loop.call_later(LINGER_S, self.transport.abort)

    def _wait(self) -> None:
        self._stop_waiting()
        self._impatient = self.loop.call_later(self.silence_s, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._impatient is not None:
            self._impatient.cancel()
            self._impatient = None

    def _hang_up(self) -> None:
        self.transport.close()


def crowded(state: dict[str, Any], template: str | None) -> bool:
    """Whether a request must be sent away because of all the connections that are open."""
    return bool(state.get(CROWDED)) and template not in PROBES
