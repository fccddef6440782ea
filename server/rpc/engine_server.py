"""The engine's RPC server: front ends submit rows and calls to it, and receive answers and state.

    connection ─► same user? HELLO in time? ─► Session ─► seats, rows, calls ─► residency, batcher
                                                  └ ends ─► its rows are cancelled, its seats released

Belongs to the engine's event loop. A front end that breaks the protocol is disconnected; other sessions go on.
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
STATE_S: Final = 0.1  # between two updates of the state that front ends hold
HEARTBEAT_S: Final = 1.0
MOST_UNREAD_BYTES: Final = 32 * 2**20  # a front end that leaves more unread is disconnected
MOST_CALLS: Final = 4096
_PEER: Final = struct.Struct("3i")  # pid, uid, gid

ExclusiveWork = Callable[[Any, Any], Any]  # from pixels and a seat to what JSON can hold


@dataclass(frozen=True)
class EngineBackend:
    """The parts of the engine that the server serves.

    size: side of the engine's images in pixels · exclusive_works: works by name, run between two batches · facts: the
    engine's state that is pushed to front ends · residents: [bytes, pinned] by "task@version"; `revision` grows with
    every change of these · views: values computed on request, by name.
    """

    batcher: Batcher
    residency: Residency
    size: int
    exclusive_works: Mapping[str, ExclusiveWork]
    facts: Callable[[], Mapping[str, Any]]
    residents: Callable[[], Mapping[str, Any]]
    revision: Callable[[], int]
    views: Mapping[str, Callable[[], Awaitable[Any]]] = field(default_factory=dict)


@dataclass(eq=False)
class _SeatLease:
    """A seat that a front end has acquired, counted over its rows and works; released with the last of them."""

    seat: Any
    residency: Residency
    users: int = 1

    def acquire(self) -> None:
        self.users += 1

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            self.residency.release(self.seat)


@dataclass(eq=False)
class _ImageRows:
    """The rows of one image, each the others' companion; `inside` of them have not left the engine."""

    rows: list[Row] = field(default_factory=list)
    inside: int = 0


class EngineServer:
    """Listens on a unix socket at `path`, in a folder that only its user may enter."""

    def __init__(self, path: Path, backend: EngineBackend) -> None:
        self._path, self.backend = path, backend
        self.sessions: set[Session] = set()
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
        self._spawn(self._send_states())

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in list(self.sessions):
            session.disconnect()

    def rows_of_others(self, session: Session) -> dict[str, dict[str, int]]:
        """Rows of all front ends but this session's, by tenant and task."""
        rows: dict[str, dict[str, int]] = {}
        for tenant, task in (row.flow for other in self.sessions - {session} for row in other.rows.values()):
            tasks = rows.setdefault(tenant, {})
            tasks[task] = tasks.get(task, 0) + 1
        return rows

    # --- inside -----------------------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            self._spawn(self._handshake_with(sock))

    async def _handshake_with(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            pixels = await loop.run_in_executor(None, _handshake, sock, self.backend.size)
            sock.setblocking(False)
            await loop.connect_accepted_socket(lambda: Session(self, pixels), sock)
        except (OSError, ProtocolError) as error:
            log.error("a front end is refused: %s", error)
            sock.close()

    async def _send_states(self) -> None:
        beats = round(HEARTBEAT_S / STATE_S)
        while True:
            for beat in range(beats):
                for session in list(self.sessions):
                    session.send_state(heartbeat=not beat)
                await asyncio.sleep(STATE_S)


def _handshake(sock: socket.socket, size: int) -> PixelReader:
    """Check the peer's user, read its HELLO, and map its shared memory. Blocks. Raises OSError, ProtocolError."""
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
    """One front end's connection: its rows by the numbers it gave them, its seats by the numbers it was given."""

    def __init__(self, server: EngineServer, pixels: PixelReader) -> None:
        self._server, self._backend, self._pixels = server, server.backend, pixels
        self._frames = FrameReader(FROM_FRONTS, protocol.MOST_TO_ENGINE)
        self.rows: dict[int, Row] = {}
        self._seats: dict[int, _SeatLease] = {}
        self._images: dict[int, _ImageRows] = {}  # by slot
        self._answered: set[int] = set()  # rows that have been answered and not left
        self._calls: set[asyncio.Task[None]] = set()
        self._last_seat = 0
        self._outbox: list[bytes] = []
        self._sent_state: dict[str, Any] = {}  # the state sent last
        self._sent_residents: Mapping[str, Any] = {}
        self._sent_revision = -1
        self._transport: asyncio.Transport | None = None

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._server.sessions.add(self)
        self.send_state(heartbeat=True)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._receive(frame)
        except (ProtocolError, UnicodeError) as error:
            log.error("a front end broke the protocol and is disconnected: %s", error)
            self.disconnect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel its rows and release its seats; a row inside the engine keeps its seat until the engine is done with
        it."""
        self._server.sessions.discard(self)
        self._transport = None
        for call in self._calls:
            call.cancel()
        for row in list(self.rows.values()):
            row.reply.cancel()
        for lease in self._seats.values():
            lease.release()
        self._seats.clear()

    def disconnect(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- frames from the front end ------------------------------------------------------------------------------------

    def _receive(self, frame: Frame) -> None:
        if frame.kind == Kind.SUBMIT:
            self._submit(protocol.read_rows(frame))
        elif frame.kind == Kind.CALL:
            self._begin_call(frame.number, protocol.read_message(frame.payload))
        elif frame.kind == Kind.CANCEL:
            for number in protocol.read_numbers(frame.payload):
                if number in self.rows:
                    self.rows[number].reply.cancel()
        else:
            for number, times in protocol.read_released(frame.payload):
                lease = self._lease(number)
                self._backend.residency.count_shared_hits(lease.seat, times)
                self._seats.pop(number).release()

    def _lease(self, number: Any) -> _SeatLease:
        lease = self._seats.get(number)
        if lease is None:
            raise ProtocolError(f"seat {number!r} is not this front end's")
        return lease

    def _submit(self, sent: Sequence[SentRow]) -> None:
        rows = [self._row(row) for row in sent]
        try:
            self._backend.batcher.submit(rows)
        except ServiceError as error:
            for row in rows:
                row.reply.set_exception(error)
                row.leave()

    def _row(self, sent: SentRow) -> Row:
        if sent.number in self.rows:
            raise ProtocolError(f"expected a new row number, got {sent.number} again")
        lease = self._lease(sent.seat) if sent.seat else None
        picture = self._pixels.picture(sent.slot, sent.form)
        context = Context()
        context.run(logs.REQUEST_ID.set, sent.request)
        row = Row(
            task=lease.seat.task if lease else "",
            tenant=sent.tenant,
            seat=lease.seat if lease else None,
            image=picture,
            deadline=sent.deadline,
            arrived=sent.arrived,
            reply=asyncio.get_running_loop().create_future(),
            companions=self._images.setdefault(sent.slot, _ImageRows()).rows,
            context=context,
        )
        if lease:
            lease.acquire()
        row.leave = partial(self._on_leave, sent, lease)
        row.reply.add_done_callback(partial(self._on_reply, sent.number))
        self.rows[sent.number] = row
        self._images[sent.slot].rows.append(row)
        self._images[sent.slot].inside += 1
        return row

    # --- frames to the front end --------------------------------------------------------------------------------------

    def _on_reply(self, number: int, reply: asyncio.Future[Any]) -> None:
        """Send an answer that comes before the row has left the engine, as from a suspended batcher."""
        row = self.rows.get(number)
        if row is not None and number not in self._answered and not reply.cancelled():
            self._answered.add(number)
            self._send(protocol.answer(number, _reply(row, left=False)))

    def _on_leave(self, sent: SentRow, lease: _SeatLease | None) -> None:
        row = self.rows.pop(sent.number)
        image_rows = self._images[sent.slot]
        image_rows.inside -= 1
        if not image_rows.inside:
            image_rows.rows.clear()  # rows that refer to each other would wait for the garbage collector
            del self._images[sent.slot]
        if lease:
            lease.release()
        if sent.number in self._answered or row.reply.cancelled():
            self._answered.discard(sent.number)
            self._send(protocol.frame(Kind.LEFT, sent.number))
        else:
            self._send(protocol.answer(sent.number, _reply(row, left=True)))

    def send_state(self, *, heartbeat: bool = False) -> None:
        """Send what has changed since the last update. `heartbeat`: send an update even where nothing has."""
        changed: dict[str, Any] = {}
        if self._backend.revision() != self._sent_revision:
            self._sent_revision = self._backend.revision()
            now = self._backend.residents()
            gone = [key for key in self._sent_residents if key not in now]
            new = {key: value for key, value in now.items() if self._sent_residents.get(key) != value}
            self._sent_residents, changed["gone"], changed["residents"] = now, gone, new
        facts = {**self._backend.facts(), "beside": self._server.rows_of_others(self)}
        changed |= {name: value for name, value in facts.items() if self._sent_state.get(name) != value}
        self._sent_state = facts
        if changed or heartbeat:
            self._send(protocol.message(Kind.STATE, 0, changed))

    def _send(self, data: bytes) -> None:
        """Queue data for the end of this turn of the event loop, so that it goes out in one write."""
        if self._transport is None:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)

    def _flush(self) -> None:
        out, self._outbox = b"".join(self._outbox), []
        if self._transport is None:
            return
        self._transport.write(out)
        if self._transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            log.error("a front end reads nothing any more and is disconnected")
            self.disconnect()

    # --- calls ------------------------------------------------------------------------------------------------------

    def _begin_call(self, number: int, request: Mapping[str, Any]) -> None:
        if len(self._calls) >= MOST_CALLS:
            raise ProtocolError(f"more than {MOST_CALLS} calls at once")
        task = asyncio.get_running_loop().create_task(self._answer_call(number, request), context=Context())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer_call(self, number: int, request: Mapping[str, Any]) -> None:
        try:
            answer = {"value": await self._result(request)}
        except ProtocolError as error:
            log.error("a front end broke the protocol and is disconnected: %s", error)
            self.disconnect()
            return
        except Exception as error:
            answer = {"fault": protocol.to_wire(error)}
            if answer["fault"]["class"] == Internal.__name__ and not isinstance(error, ServiceError):
                log.exception("a call failed: %s", request.get("do"))
        self.send_state()  # before the answer, so that the caller sees what the call has changed
        self._send(protocol.message(Kind.RETURN, number, answer))

    async def _result(self, request: Mapping[str, Any]) -> Any:
        do, residency = request.get("do"), self._backend.residency
        if do == "aside":
            return await self._run_exclusive(request)
        if do == "view":
            return await self._view(request.get("name"))
        task, version = request.get("task"), request.get("version")
        if not isinstance(task, str) or not isinstance(version, str):
            raise ProtocolError(f"expected a task and a version to {str(do)[:100]!r}")
        if do == "acquire":
            return await self._acquire(task, version, bool(request.get("known")))
        if do == "load":
            return await residency.load(task, version)
        if do == "unload":
            return await residency.unload(task, version)
        if do == "pin":
            return await residency.pin(task, version, bool(request.get("on")))
        raise ProtocolError(f"expected a known call, got {str(do)[:100]!r}")

    async def _acquire(self, task: str, version: str, known: bool) -> dict[str, Any]:
        """Give out a seat. `known`: the front end has the version's labels and geometry, which never change."""
        lease = _SeatLease(await self._backend.residency.acquire(task, version), self._backend.residency)
        if self._transport is None:
            lease.release()
            raise ProtocolError("the front end has disconnected")
        self._last_seat += 1
        self._seats[self._last_seat] = lease
        facts = {} if known else {"labels": list(lease.seat.labels), "geometry": asdict(lease.seat.geometry)}
        return {"seat": self._last_seat, "place": lease.seat.slot, **facts}

    async def _run_exclusive(self, request: Mapping[str, Any]) -> Any:
        work, lease = self._backend.exclusive_works.get(str(request.get("work"))), self._lease(request.get("seat"))
        slot, form = request.get("slot"), request.get("form")
        if work is None or not isinstance(slot, int) or form not in (Form.BYTES, Form.FLOATS):
            raise ProtocolError("expected a work, a slot and a form of pixels")
        picture = self._pixels.picture(
            slot, Form(form)
        ).copy()  # the front end may disconnect, and reuse the slot, before the work runs
        lease.acquire()
        try:
            return await self._backend.batcher.run_exclusive(work, picture, lease.seat)
        finally:
            lease.release()

    async def _view(self, name: Any) -> Any:
        if not isinstance(name, str) or name not in self._backend.views:
            raise ProtocolError(f"there is no view {str(name)[:100]!r}")
        return await self._backend.views[name]()


def _reply(row: Row, *, left: bool) -> Reply:
    error = row.reply.exception()
    if error is None:
        outcome = row.reply.result()
        if outcome is None:
            outcome = Internal("the engine gave no answer", code="engine_failed")
    else:
        outcome = error if isinstance(error, ServiceError) else Internal("the engine failed", code="engine_failed")
    return Reply(outcome, left, row.watch.queue_s, row.watch.compute_s)
