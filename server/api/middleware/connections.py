"""Connections: how many may be open, and how long the head of a request may take.

    up to `most`      served
    beyond it         the connection that has been idle longest, for IDLE_S or more, is closed to make room
    none is idle      RESERVED more: probes (`PROBES`) are answered, other requests get 503 too_many_connections, see
                      `auth`; beyond these, 503 without reading anything, and the connection is closed

Clients that are not answered in time open ever more connections, and each costs memory and a file descriptor. One
address may hold half of them, unless it is a trusted proxy's.
"""

from __future__ import annotations

import asyncio
import math
import resource
from collections import Counter, OrderedDict
from typing import Any, ClassVar, Final

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CROWDED: Final = "crowded"  # in the state of a request on a connection above `most`
PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
LOOPBACK: Final = "127.0.0.1,::1"
RETRY_S: Final = 1.0
RESERVED: Final = 64
IDLE_S: Final = 1.0  # a connection that is younger may be about to send
LINGER_S: Final = 1.0  # closing a connection with unread bytes would discard the response
OTHER_FILES: Final = 256  # files that a server opens beside its connections
_BODY: Final = b'{"type":"about:blank","title":"Service Unavailable","status":503,"code":"too_many_connections",\
"detail":"too many connections are open"}'
REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: %d\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (RETRY_S, len(_BODY), _BODY)
)


def with_files_for(most: int) -> int:
    """Raise the process's limit of open files as far as allowed; return how many connections that is enough for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = most + RESERVED + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(most, soft - RESERVED - OTHER_FILES))
    return most


def limited(most: int, silence_s: float, proxies: str = LOOPBACK) -> type[HttpToolsProtocol]:
    """uvicorn's protocol for at most so many connections.

    `silence_s`: the longest the head of a request may take. `proxies`: addresses that may hold all connections, as
    uvicorn's `forwarded_allow_ips`.
    """

    class Limited(_Limited):
        pass

    Limited.most, Limited.silence_s = most, silence_s
    Limited.proxies = ProxyHeadersMiddleware(_nothing, proxies).trusted_hosts
    Limited.idle, Limited.evicted, Limited.addresses = OrderedDict(), set(), Counter()
    return Limited


class _Limited(HttpToolsProtocol):
    most = 0
    silence_s = 0.0
    proxies: ClassVar[Any]  # what contains their addresses
    idle: ClassVar[OrderedDict[_Limited, float]]  # connections without a whole request, since when, the oldest first
    evicted: ClassVar[set[_Limited]]
    addresses: ClassVar[Counter[str]]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own signature
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.addresses[self._address] += 1
        self._timer: asyncio.TimerHandle | None = None
        self._evict()
        over = len(self.connections) - len(self.evicted) - self.most
        alone = self.addresses[self._address] > max(1, self.most // 2) and self._address not in self.proxies
        self._refused = over > RESERVED or alone
        if self._refused:
            self._refuse()
            return
        self._start_timer()
        self.idle[self] = self.loop.time()
        if over > 0:
            self.app_state = {**self.app_state, CROWDED: True}

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self.idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        if not self.pipeline and not self.transport.is_closing():
            self.idle[self] = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.idle.pop(self, None)
        self.evicted.discard(self)
        self.addresses.subtract({self._address: 1})
        if not self.addresses[self._address]:
            del self.addresses[self._address]
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._stop_timer()
        super().shutdown()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _evict(self) -> None:
        """Close the connection that has been idle longest, where there is one too many."""
        oldest, since = next(iter(self.idle.items()), (self, math.inf))
        if len(self.connections) - len(self.evicted) > self.most and self.loop.time() - since >= IDLE_S:
            del self.idle[oldest]
            self.evicted.add(oldest)  # until it is closed, a moment later
            oldest.transport.close()

    def _refuse(self) -> None:
        self.transport.write(REFUSAL)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.silence_s, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self.transport.close()


async def _nothing(*_: Any) -> None:
    """The application of a middleware of which only the list of addresses is used."""


def crowded(state: dict[str, Any], template: str | None) -> bool:
    """Whether a request must be refused because too many connections are open."""
    return bool(state.get(CROWDED)) and template not in PROBES
