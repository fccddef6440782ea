"""The engine's side: a desk at which front ends hand rows in and get answers back.

    connection ─► same user? HELLO in time? ─► Guest ─► seats, rows, calls ─► residency, batcher
                                                 └ leaves ─► its rows are withdrawn, its seats given back

Belongs to the engine's event loop. A guest that breaks the protocol is cut off; nobody else notices.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server.batching.batcher import Batcher
from server.batching.row import Row
from server.errors import Internal, ServiceError
from server.observability import logs

from . import protocol
from .protocol import Form, Frame, FrameReader, Kind, ProtocolError, Reply, SentRow
from .shared_memory import PixelReader

if TYPE_CHECKING:  # it loads torch, which front ends need not
    from server.engine.residency import Residency

log = logging.getLogger(__name__)

FROM_FRONTS: Final = (Kind.CALL, Kind.SUBMIT, Kind.CANCEL, Kind.RELEASE)
HELLO_S: Final = 10.0
TELL_S: Final = 0.1  # between two looks at what has changed
HEARTBEAT_S: Final = 1.0
MOST_WAITING: Final = 32 * 2**20  # bytes that a front has not taken: one that reads nothing is cut off
MOST_CALLS: Final = 4096
_PEER: Final = struct.Struct("3i")  # pid, uid, gid

ExclusiveWork = Callable[[Any, Any], Any]  # pixels and a seat to JSON


@dataclass(frozen=True)
class EngineBackend:
    """What the desk stands in. `size`: of the engine's pictures. `asides`: works by name; `facts`: what fronts are told
    of the engine at any time, beside its queue; `residents`: by "task@version" [bytes, pinned]; `revision` grows with
    every change of these; `views`: what is told when it is asked for."""

    batcher: Batcher
    residency: Residency
    size: int
    asides: Mapping[str, ExclusiveWork]
    facts: Callable[[], Mapping[str, Any]]
    residents: Callable[[], Mapping[str, Any]]
    revision: Callable[[], int]
    views: Mapping[str, Callable[[], Awaitable[Any]]] = field(default_factory=dict)


@dataclass(eq=False)
class _SeatLease:
    """A seat that a front has taken, and the rows and works of it that need it; given back with the last of them."""

    seat: Any
    residency: Residency
    users: int = 1

    def share(self) -> None:
        self.users += 1

    def drop(self) -> None:
        self.users -= 1
        if not self.users:
            self.residency.release(self.seat)


@dataclass(eq=False)
class _ImageRows:
    """The rows of one picture, which know each other, and how many of them have not left."""

    rows: list[Row] = field(default_factory=list)
    inside: int = 0


class EngineServer:
    """Listens at `path`, in a folder that is its user's alone."""

    def __init__(self, path: Path, room: EngineBackend) -> None:
        self._path, self.room = path, room
        self.guests: set[Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    async def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._path.unlink(missing_ok=True)  # of an engine before this one
        self._listener.bind(str(self._path))
        os.chmod(self._path, 0o600)
        self._listener.listen(128)
        self._spawn(self._accept(self._listener))
        self._spawn(self._tell())

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in list(self.guests):
            guest.leave()

    def held_beside(self, guest: Session) -> dict[str, dict[str, int]]:
        """Rows of other front ends than this one, by tenant and task."""
        held: dict[str, dict[str, int]] = {}
        for tenant, task in (row.flow for other in self.guests - {guest} for row in other.rows.values()):
            tasks = held.setdefault(tenant, {})
            tasks[task] = tasks.get(task, 0) + 1
        return held

    # --- inside -----------------------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            self._spawn(self._admit(sock))

    async def _admit(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            window = await loop.run_in_executor(None, _handshake, sock, self.room.size)
            sock.setblocking(False)
            await loop.connect_accepted_socket(lambda: Session(self, window), sock)
        except (OSError, ProtocolError) as error:
            log.error("a front end is not let in: %s", error)
            sock.close()

    async def _tell(self) -> None:
        beats = round(HEARTBEAT_S / TELL_S)
        while True:
            for beat in range(beats):
                for guest in list(self.guests):
                    guest.tell(always=not beat)
                await asyncio.sleep(TELL_S)


def _handshake(sock: socket.socket, size: int) -> PixelReader:
    """Blocks until a front has said who it is and given its memory. Raises OSError, ProtocolError."""
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != os.getuid():
        raise ProtocolError(f"expected a process of user {os.getuid()}, got one of user {uid}")
    sock.setblocking(True)
    sock.settimeout(HELLO_S)
    data, descriptors, _, _ = socket.recv_fds(sock, 4096, 4)
    try:
        [(kind, _, payload)] = FrameReader((Kind.HELLO,), 4096).feed(data)
        hello = protocol.read_message(payload)
        if kind != Kind.HELLO or hello.get("version") != protocol.VERSION or hello.get("size") != size:
            raise ProtocolError(f"expected version {protocol.VERSION} and pictures of {size} pixels, got {hello}")
        if len(descriptors) != 1 or not isinstance(hello.get("slots"), int):
            raise ProtocolError(f"expected one descriptor and how many slots it has, got {len(descriptors)}")
        return PixelReader(descriptors[0], hello["slots"], size)
    except ValueError:
        raise ProtocolError("expected a HELLO and nothing else") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class Session(asyncio.Protocol):
    """One front end: its rows and the seats it has taken, by the numbers it gave or got."""

    def __init__(self, desk: EngineServer, window: PixelReader) -> None:
        self._desk, self._room, self._window = desk, desk.room, window
        self._reader = FrameReader(FROM_FRONTS, protocol.MOST_TO_ENGINE)
        self.rows: dict[int, Row] = {}
        self._seats: dict[int, _SeatLease] = {}
        self._shown: dict[int, _ImageRows] = {}  # by slot
        self._answered: set[int] = set()  # rows that have been answered and not left
        self._calls: set[asyncio.Task[None]] = set()
        self._last_seat = 0
        self._out: list[bytes] = []
        self._known: dict[str, Any] = {}  # what it was told last
        self._residents: Mapping[str, Any] = {}
        self._revision = -1
        self._transport: asyncio.Transport | None = None

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._desk.guests.add(self)
        self.tell(always=True)

    def data_received(self, data: bytes) -> None:
        try:
            for one in self._reader.feed(data):
                self._take(one)
        except (ProtocolError, UnicodeError) as error:
            log.error("a front end is cut off: %s", error)
            self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        """Everything that it held is let go of, what is inside the engine as soon as that is through with it."""
        self._desk.guests.discard(self)
        self._transport = None
        for call in self._calls:
            call.cancel()
        for row in list(self.rows.values()):
            row.reply.cancel()
        for hold in self._seats.values():
            hold.drop()
        self._seats.clear()

    def leave(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- what comes -------------------------------------------------------------------------------------------------

    def _take(self, one: Frame) -> None:
        if one.kind == Kind.SUBMIT:
            self._submit(protocol.read_rows(one))
        elif one.kind == Kind.CALL:
            self._call(one.number, protocol.read_message(one.payload))
        elif one.kind == Kind.CANCEL:
            for number in protocol.read_numbers(one.payload):
                if number in self.rows:
                    self.rows[number].reply.cancel()
        else:
            for number, times in protocol.read_released(one.payload):
                hold = self._hold(number)
                self._room.residency.again(hold.seat, times)
                self._seats.pop(number).drop()

    def _hold(self, number: Any) -> _SeatLease:
        hold = self._seats.get(number)
        if hold is None:
            raise ProtocolError(f"seat {number!r} is not this front end's")
        return hold

    def _submit(self, sent: Sequence[SentRow]) -> None:
        rows = [self._row(one) for one in sent]
        try:
            self._room.batcher.submit(rows)
        except ServiceError as error:
            for row in rows:
                row.reply.set_exception(error)
                row.leave()

    def _row(self, sent: SentRow) -> Row:
        if sent.number in self.rows:
            raise ProtocolError(f"row {sent.number} is here already")
        hold = self._hold(sent.seat) if sent.seat else None
        picture = self._window.picture(sent.slot, sent.form)
        context = Context()
        context.run(logs.REQUEST_ID.set, sent.request)
        row = Row(
            task=hold.seat.task if hold else "",
            tenant=sent.tenant,
            seat=hold.seat if hold else None,
            image=picture,
            deadline=sent.deadline,
            arrived=sent.arrived,
            reply=asyncio.get_running_loop().create_future(),
            companions=self._shown.setdefault(sent.slot, _ImageRows()).rows,
            context=context,
        )
        if hold:
            hold.share()
        row.leave = partial(self._left, sent, hold)
        row.reply.add_done_callback(partial(self._replied, sent.number))
        self.rows[sent.number] = row
        self._shown[sent.slot].rows.append(row)
        self._shown[sent.slot].inside += 1
        return row

    # --- what goes --------------------------------------------------------------------------------------------------

    def _replied(self, number: int, reply: asyncio.Future[Any]) -> None:
        """Answered before the engine is through with it, as a suspended batcher does."""
        row = self.rows.get(number)
        if row is not None and number not in self._answered and not reply.cancelled():
            self._answered.add(number)
            self._send(protocol.answer(number, _reply(row, left=False)))

    def _left(self, sent: SentRow, hold: _SeatLease | None) -> None:
        row = self.rows.pop(sent.number)
        shown = self._shown[sent.slot]
        shown.inside -= 1
        if not shown.inside:
            shown.rows.clear()  # they know each other: none would go before the garbage is collected
            del self._shown[sent.slot]
        if hold:
            hold.drop()
        if sent.number in self._answered or row.reply.cancelled():
            self._answered.discard(sent.number)
            self._send(protocol.frame(Kind.LEFT, sent.number))
        else:
            self._send(protocol.answer(sent.number, _reply(row, left=True)))

    def tell(self, *, always: bool = False) -> None:
        """What has changed since it was told last; `always`: that nothing has, too."""
        changed: dict[str, Any] = {}
        if self._room.revision() != self._revision:
            self._revision = self._room.revision()
            now = self._room.residents()
            gone = [key for key in self._residents if key not in now]
            new = {key: value for key, value in now.items() if self._residents.get(key) != value}
            self._residents, changed["gone"], changed["residents"] = now, gone, new
        facts = {**self._room.facts(), "beside": self._desk.held_beside(self)}
        changed |= {name: value for name, value in facts.items() if self._known.get(name) != value}
        self._known = facts
        if changed or always:
            self._send(protocol.message(Kind.STATE, 0, changed))

    def _send(self, data: bytes) -> None:
        """All that is to go in one turn of the loop goes together."""
        if self._transport is None:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        out, self._out = b"".join(self._out), []
        if self._transport is None:
            return
        self._transport.write(out)
        if self._transport.get_write_buffer_size() > MOST_WAITING:
            log.error("a front end takes nothing any more and is cut off")
            self.leave()

    # --- calls ------------------------------------------------------------------------------------------------------

    def _call(self, number: int, asked: Mapping[str, Any]) -> None:
        if len(self._calls) >= MOST_CALLS:
            raise ProtocolError(f"more than {MOST_CALLS} calls at once")
        task = asyncio.get_running_loop().create_task(self._answer(number, asked), context=Context())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, number: int, asked: Mapping[str, Any]) -> None:
        try:
            answer = {"value": await self._done(asked)}
        except ProtocolError as error:
            log.error("a front end is cut off: %s", error)
            self.leave()
            return
        except Exception as error:
            answer = {"fault": protocol.told(error)}
            if answer["fault"]["class"] == Internal.__name__ and not isinstance(error, ServiceError):
                log.exception("a call failed: %s", asked.get("do"))
        self.tell()  # before the answer, so that whoever has it sees what it has changed
        self._send(protocol.message(Kind.RETURN, number, answer))

    async def _done(self, asked: Mapping[str, Any]) -> Any:
        do, residency = asked.get("do"), self._room.residency
        if do == "aside":
            return await self._aside(asked)
        if do == "view":
            return await self._view(asked.get("name"))
        task, version = asked.get("task"), asked.get("version")
        if not isinstance(task, str) or not isinstance(version, str):
            raise ProtocolError(f"expected a task and a version to {str(do)[:100]!r}")
        if do == "acquire":
            return await self._acquire(task, version, bool(asked.get("known")))
        if do == "load":
            return await residency.load(task, version)
        if do == "unload":
            return await residency.unload(task, version)
        if do == "pin":
            return await residency.pin(task, version, bool(asked.get("on")))
        raise ProtocolError(f"nobody can {str(do)[:100]!r} here")

    async def _acquire(self, task: str, version: str, known: bool) -> dict[str, Any]:
        """`known`: the front has the version's facts, which never change."""
        hold = _SeatLease(await self._room.residency.acquire(task, version), self._room.residency)
        if self._transport is None:
            hold.drop()
            raise ProtocolError("the front end has gone")
        self._last_seat += 1
        self._seats[self._last_seat] = hold
        facts = {} if known else {"labels": list(hold.seat.labels), "geometry": asdict(hold.seat.geometry)}
        return {"seat": self._last_seat, "place": hold.seat.slot, **facts}

    async def _aside(self, asked: Mapping[str, Any]) -> Any:
        work, hold = self._room.asides.get(str(asked.get("work"))), self._hold(asked.get("seat"))
        slot, form = asked.get("slot"), asked.get("form")
        if work is None or not isinstance(slot, int) or form not in (Form.BYTES, Form.FLOATS):
            raise ProtocolError("expected a work, a slot and a form of pixels")
        picture = self._window.picture(slot, Form(form)).copy()  # the front may leave before it is looked at
        hold.share()
        try:
            return await self._room.batcher.run_exclusive(work, picture, hold.seat)
        finally:
            hold.drop()

    async def _view(self, name: Any) -> Any:
        if not isinstance(name, str) or name not in self._room.views:
            raise ProtocolError(f"there is no view {str(name)[:100]!r}")
        return await self._room.views[name]()


def _reply(row: Row, *, left: bool) -> Reply:
    error = row.reply.exception()
    if error is None:
        outcome = row.reply.result()
        if outcome is None:
            outcome = Internal("the engine gave no answer", code="engine_failed")
    else:
        outcome = error if isinstance(error, ServiceError) else Internal("the engine failed", code="engine_failed")
    return Reply(outcome, left, row.watch.queue_s, row.watch.compute_s)
