"""A front end's side: the line to the engine's process, kept up, and what the engine has told over it.

    connected ─► HELLO ─► STATE … ─► calls and rows go out, answers come in
        ▲                                │ the engine dies, hangs up, or has been silent for too long
        └──── again and again ◄──────────┴─► who waits is told: 503 engine_unavailable

Belongs to the front's event loop. Whatever was taken over an earlier connection is void: `epoch` counts them.
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
AGAIN_S: Final = 0.1
AWAY: Final = "the engine is not there; it is being started"
SILENT: Final = "the engine has said nothing for too long"


@dataclass
class EngineState:
    """What the engine told last. `residents`: [bytes, pinned] by "task@version"."""

    facts: dict[str, Any] = field(default_factory=dict)
    residents: dict[str, list[Any]] = field(default_factory=dict)

    def learn(self, told: Mapping[str, Any]) -> None:
        """Raises ProtocolError."""
        new, gone = told.get("residents", {}), told.get("gone", [])
        if not isinstance(new, dict) or not isinstance(gone, list):
            raise ProtocolError("expected residents by their names")
        for key in gone:
            self.residents.pop(key, None)
        self.residents |= new
        self.facts |= {name: value for name, value in told.items() if name not in ("residents", "gone")}


class EngineConnection:
    """`on_frame` gets ANSWER and LEFT; `on_lost` is called when a connection is gone, `on_state` when there is news.
    `silence_s`: how long an engine that is connected may say nothing; 0: as long as it likes."""

    def __init__(self, path: Path, slots: PixelWriter, *, silence_s: float = 0.0) -> None:
        self._path, self._slots, self._silence_s = path, slots, silence_s
        self.mirror = EngineState()
        self.epoch = 0
        self.on_frame: Callable[[Frame], None] = lambda frame: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_state: Callable[[EngineState], None] = lambda mirror: None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(1)
        self._connection: _Connection | None = None
        self._heard_at = 0.0
        self._up = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._leaving = False
        self._out: list[bytes] = []

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep(), name="line")

    async def connected(self) -> None:
        """Returns when the engine has told its state."""
        await self._up.wait()

    async def stop(self) -> None:
        self._leaving = True
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self._hang_up()

    @property
    def trouble(self) -> str:
        """Why nothing can be asked just now; "" when it can."""
        if not self._up.is_set():
            return AWAY
        if self._silence_s and time.monotonic() - self._heard_at > self._silence_s:
            return SILENT
        return str(self.mirror.facts.get("trouble", ""))

    def require(self) -> None:
        """Raises Unavailable (engine_unavailable)."""
        if trouble := self.trouble:
            raise engine_unavailable(trouble)

    async def call(self, do: str, **arguments: Any) -> Any:
        """Raises what the engine's side raised, or Unavailable (engine_unavailable)."""
        self.require()
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self.send(protocol.message(Kind.CALL, number, {"do": do, **arguments}))
        try:
            return await answer
        finally:
            self._calls.pop(number, None)

    def send(self, data: bytes) -> None:
        """All that is to go in one turn of the loop goes together; what is for an engine that is gone goes nowhere."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        out, self._out = b"".join(self._out), []
        if self._connection is not None:
            self._connection.transport.write(out)

    async def _keep(self) -> None:
        while True:
            try:
                connection = await self._connect()
            except OSError:
                await asyncio.sleep(AGAIN_S)
                continue
            await connection.gone.wait()
            self._lost()
            await asyncio.sleep(AGAIN_S)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(self._path))
            hello = {
                "version": protocol.VERSION,
                "pid": os.getpid(),
                "slots": self._slots.count,
                "size": self._slots.size,
            }
            socket.send_fds(sock, [protocol.message(Kind.HELLO, 0, hello)], [self._slots.descriptor])
            self.epoch += 1
            self.mirror, self._heard_at = EngineState(), time.monotonic()
            _, connection = await loop.create_unix_connection(lambda: _Connection(self._take), sock=sock)
        except BaseException:
            sock.close()
            raise
        self._connection = connection
        return connection

    def _lost(self) -> None:
        log.log(logging.INFO if self._leaving else logging.ERROR, "the line to %s is gone", self._path.name)
        self._connection, self.mirror = None, EngineState()
        self._up.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(engine_unavailable(AWAY))
        self._calls.clear()
        self._out.clear()
        self.on_lost()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.transport.abort()
            self._lost()

    def _take(self, frame: Frame) -> None:
        self._heard_at = time.monotonic()
        if frame.kind == Kind.STATE:
            self.mirror.learn(protocol.read_message(frame.payload))
            self._up.set()
            self.on_state(self.mirror)
        elif frame.kind == Kind.RETURN:
            self._return(frame.number, protocol.read_message(frame.payload))
        else:
            self.on_frame(frame)

    def _return(self, number: int, told: Mapping[str, Any]) -> None:
        answer, fault = self._calls.get(number), told.get("fault")
        if answer is None or answer.done():
            self._returned_to_nobody(told)
        elif fault is None:
            answer.set_result(told.get("value"))
        else:
            answer.set_exception(protocol.failure(fault))

    def _returned_to_nobody(self, told: Mapping[str, Any]) -> None:
        """A seat that was taken for somebody who has left meanwhile is given back."""
        value = told.get("value")
        if isinstance(value, dict) and isinstance(value.get("seat"), int):
            self.send(protocol.released({value["seat"]: 0}))


class _Connection(asyncio.Protocol):
    def __init__(self, take: Callable[[Frame], None]) -> None:
        self._take, self._reader = take, FrameReader(FROM_ENGINE, protocol.MOST_TO_FRONT)
        self.gone = asyncio.Event()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._take(frame)
        except (ProtocolError, ServiceError) as error:
            log.error("the engine is hung up on: %s", error)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()


def request_id() -> str:
    """Of the request that is being answered: the engine's log names it, too."""
    return logs.REQUEST_ID.get()[: protocol.LONGEST_NAME // 4]
