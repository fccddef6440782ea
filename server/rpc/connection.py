"""A front end's connection to an engine's process, kept up, and the engine's state as it was pushed last.

    connected ─► HELLO ─► STATE … ─► calls and rows go out, answers come in
        ▲                                │ the engine dies, disconnects, or has been silent for too long
        └────────── reconnect ◄──────────┴─► calls and rows under way fail: 503 engine_unavailable

Belongs to the front end's event loop. Seats and rows of an earlier connection are void: `epoch` counts connections.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from server.batching.admission import engine_unavailable
from server.errors import ServiceError
from server.observability import logs

from . import protocol
from .protocol import Frame, FrameReader, Kind, ProtocolError
from .shared_memory import PixelWriter

log = logging.getLogger(__name__)

FROM_ENGINE: Final = (Kind.RETURN, Kind.ANSWER, Kind.LEFT, Kind.STATE)
RECONNECT_S: Final = 0.1
AWAY: Final = "the engine is not there; it is being started"
SILENT: Final = "the engine has sent nothing for too long"


@dataclass
class EngineState:
    """The engine's state as it was pushed last. `residents`: [bytes, pinned] by "task@version"."""

    facts: dict[str, Any] = field(default_factory=dict)
    residents: dict[str, list[Any]] = field(default_factory=dict)

    def learn(self, message: Mapping[str, Any]) -> None:
        """Apply an update. Raises ProtocolError."""
        new, gone = message.get("residents", {}), message.get("gone", [])
        if not isinstance(new, dict) or not isinstance(gone, list):
            raise ProtocolError("expected residents by their names")
        for key in gone:
            self.residents.pop(key, None)
        self.residents |= new
        self.facts |= {name: value for name, value in message.items() if name not in ("residents", "gone")}


class EngineConnection:
    """Reconnects by itself, and runs calls.

    `on_frame` gets ANSWER and LEFT frames; `on_lost` is called when a connection has ended, `on_state` after an update
    of `state`. `silence_s`: how long a connected engine may send nothing; 0: for ever.
    """

    def __init__(self, path: Path, writer: PixelWriter, *, silence_s: float = 0.0) -> None:
        self._path, self._writer, self._silence_s = path, writer, silence_s
        self.state = EngineState()
        self.epoch = 0
        self.on_frame: Callable[[Frame], None] = lambda frame: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_state: Callable[[EngineState], None] = lambda state: None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(1)
        self._connection: _Connection | None = None
        self._last_heard = 0.0
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._outbox: list[bytes] = []

    def start(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name="line")

    async def connected(self) -> None:
        """Return when the engine has sent its state."""
        await self._ready.wait()

    async def stop(self) -> None:
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._disconnect()

    @property
    def trouble(self) -> str:
        """Why the engine cannot be called now; "" when it can."""
        if not self._ready.is_set():
            return AWAY
        if self._silence_s and time.monotonic() - self._last_heard > self._silence_s:
            return SILENT
        return str(self.state.facts.get("trouble", ""))

    def require(self) -> None:
        """Raises Unavailable (engine_unavailable)."""
        if trouble := self.trouble:
            raise engine_unavailable(trouble)

    async def call(self, do: str, **arguments: Any) -> Any:
        """Run a call in the engine's process. Raises what it raised there, or Unavailable (engine_unavailable)."""
        self.require()
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self.send(protocol.message(Kind.CALL, number, {"do": do, **arguments}))
        try:
            return await answer
        finally:
            self._calls.pop(number, None)

    def send(self, data: bytes) -> None:
        """Queue data for the end of this turn of the event loop. Data for an engine that is away is dropped."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        out, self._outbox = b"".join(self._outbox), []
        if self._connection is not None:
            self._connection.transport.write(out)

    async def _stay_connected(self) -> None:
        while True:
            try:
                connection = await self._connect()
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            await connection.gone.wait()
            self._lost()
            await asyncio.sleep(RECONNECT_S)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(self._path))
            hello = {
                "version": protocol.VERSION,
                "pid": os.getpid(),
                "slots": self._writer.count,
                "size": self._writer.size,
            }
            socket.send_fds(sock, [protocol.message(Kind.HELLO, 0, hello)], [self._writer.descriptor])
            self.epoch += 1
            self.state, self._last_heard = EngineState(), time.monotonic()
            _, connection = await loop.create_unix_connection(lambda: _Connection(self._receive), sock=sock)
        except BaseException:
            sock.close()
            raise
        self._connection = connection
        return connection

    def _lost(self) -> None:
        log.log(logging.INFO if self._closing else logging.ERROR, "the connection to %s is lost", self._path.name)
        self._connection, self.state = None, EngineState()
        self._ready.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(engine_unavailable(AWAY))
        self._calls.clear()
        self._outbox.clear()
        self.on_lost()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.transport.abort()
            self._lost()

    def _receive(self, frame: Frame) -> None:
        self._last_heard = time.monotonic()
        if frame.kind == Kind.STATE:
            self.state.learn(protocol.read_message(frame.payload))
            self._ready.set()
            self.on_state(self.state)
        elif frame.kind == Kind.RETURN:
            self._resolve_call(frame.number, protocol.read_message(frame.payload))
        else:
            self.on_frame(frame)

    def _resolve_call(self, number: int, message: Mapping[str, Any]) -> None:
        answer, fault = self._calls.get(number), message.get("fault")
        if answer is None or answer.done():
            self._release_unclaimed_seat(message)
        elif fault is None:
            answer.set_result(message.get("value"))
        else:
            answer.set_exception(protocol.failure(fault))

    def _release_unclaimed_seat(self, message: Mapping[str, Any]) -> None:
        """Release a seat whose caller was cancelled meanwhile."""
        value = message.get("value")
        if isinstance(value, dict) and isinstance(value.get("seat"), int):
            self.send(protocol.released({value["seat"]: 0}))


class _Connection(asyncio.Protocol):
    def __init__(self, take: Callable[[Frame], None]) -> None:
        self._receive, self._reader = take, FrameReader(FROM_ENGINE, protocol.MOST_TO_FRONT)
        self.gone = asyncio.Event()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._receive(frame)
        except (ProtocolError, ServiceError) as error:
            log.error("the engine broke the protocol and is disconnected: %s", error)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()


def request_id() -> str:
    """The id of the request being answered, for the engine's log."""
    return logs.REQUEST_ID.get()[: protocol.LONGEST_NAME // 4]
