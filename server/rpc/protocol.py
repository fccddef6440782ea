"""The wire format between front ends and the engine's process on a unix socket, to the byte.

    frame     length of the payload u32 · kind u8 · number u64 · payload            all numbers big-endian
    HELLO     front: JSON; beside it the descriptor of the shared memory that its pixels lie in
    CALL      front: JSON {"do": …}; answered by one RETURN of the same number: JSON {"value": …} or {"fault": …}
    SUBMIT    front: rows, each ROW and its tenant and request id; answered by one ANSWER each
    CANCEL    front: row numbers, u64 each
    RELEASE   front: seats, each its number u64 · how often the front end shared it without a call u64
    ANSWER    engine: of the row `number`: REPLY, then logits [C] float64, features [D] float32, or a fault in JSON
    LEFT      engine: the row `number`, answered before, has left the engine: its pixels may be overwritten
    STATE     engine: JSON, what has changed

Nothing here is unpickled or run. Lengths are checked before anything is kept; what does not fit is a ProtocolError, and
ends the connection. No sockets here: bytes in, frames out.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prompts_store import errors as stored
from server import errors
from server.errors import Internal, ServiceError

VERSION: Final = 2
MIB: Final = 2**20
MOST_TO_ENGINE: Final = MIB
MOST_TO_FRONT: Final = 32 * MIB
MOST_ROWS: Final = 4096  # in one SUBMIT
LONGEST_NAME: Final = 512

HEADER: Final = struct.Struct(">IBQ")
ROW: Final = struct.Struct(">QIIBddHH")  # number, seat (0: none), slot, form, deadline, arrived; lengths of two texts
REPLY: Final = struct.Struct(">BBdd")  # form, has it left the engine too, seconds in the queue, seconds of the forward
NUMBER: Final = struct.Struct(">Q")
SEAT: Final = struct.Struct(">QQ")  # number, times


class ProtocolError(Exception):
    """The peer broke the protocol."""


class Kind(IntEnum):
    HELLO = 1
    CALL = 2
    SUBMIT = 3
    CANCEL = 4
    RELEASE = 5
    RETURN = 17
    ANSWER = 18
    LEFT = 19
    STATE = 20


class Form(IntEnum):
    """Of pixels: uint8 [S, S, 3] or float32 [3, S, S]. Of an answer: float64, float32 or a fault."""

    BYTES = 0
    FLOATS = 1
    DOUBLES = 2
    FAULT = 3


class Frame(NamedTuple):
    kind: Kind
    number: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class SentRow:
    """A row on the wire. `seat` 0: a row for the backbone's features. Times are of the monotonic clock."""

    number: int
    seat: int
    slot: int
    form: Form
    deadline: float
    arrived: float
    tenant: str
    request: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A row's answer: numbers, or an error. `left`: the row has left the engine too, so its pixels may be
    overwritten."""

    outcome: NDArray[Any] | ServiceError
    left: bool
    queue_s: float
    compute_s: float


# --- frames -----------------------------------------------------------------------------------------------------------


def frame(kind: Kind, number: int = 0, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), kind, number) + payload


def message(kind: Kind, number: int, value: Any) -> bytes:
    return frame(kind, number, json.dumps(value, separators=(",", ":")).encode())


def read_message(payload: bytes) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise ProtocolError("expected JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"expected a JSON object, got {type(value).__name__}")
    return value


class FrameReader:
    """Splits a socket's bytes into frames. `kinds`: the kinds that are accepted; `most`: bytes of a payload."""

    def __init__(self, kinds: Sequence[Kind], most: int) -> None:
        self._kinds, self._most = frozenset(kinds), most
        self._got = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete. Raises ProtocolError as soon as a header is not acceptable."""
        self._got += data
        at = 0
        try:
            while len(self._got) - at >= HEADER.size:
                length, kind, number = HEADER.unpack_from(self._got, at)
                if kind not in self._kinds or length > self._most:
                    raise ProtocolError(
                        f"expected a frame of an accepted kind and size, got kind {kind}, {length} bytes"
                    )
                end = at + HEADER.size + length
                if len(self._got) < end:
                    return
                payload = bytes(self._got[at + HEADER.size : end])
                at = end
                yield Frame(Kind(kind), number, payload)
        finally:
            del self._got[:at]


# --- rows and answers -------------------------------------------------------------------------------------------------


def submit(rows: Sequence[SentRow]) -> bytes:
    parts = []
    for row in rows:
        tenant, request = row.tenant.encode(), row.request.encode()
        parts.append(
            ROW.pack(*(row.number, row.seat, row.slot, row.form, row.deadline, row.arrived, len(tenant), len(request)))
        )
        parts += (tenant, request)
    return frame(Kind.SUBMIT, len(rows), b"".join(parts))


def read_rows(sent: Frame) -> list[SentRow]:
    if not 1 <= sent.number <= MOST_ROWS:
        raise ProtocolError(f"expected 1 to {MOST_ROWS} rows, got {sent.number}")
    rows, at = [], 0
    for _ in range(sent.number):
        row, at = _row(sent.payload, at)
        rows.append(row)
    if at != len(sent.payload):
        raise ProtocolError(f"{len(sent.payload) - at} bytes behind the last row")
    return rows


def _row(payload: bytes, at: int) -> tuple[SentRow, int]:
    if at + ROW.size > len(payload):
        raise ProtocolError("a row is cut off")
    number, seat, slot, form, deadline, arrived, *lengths = ROW.unpack_from(payload, at)
    at += ROW.size
    texts = []
    for length in lengths:
        if length > LONGEST_NAME or at + length > len(payload):
            raise ProtocolError("a row's text is too long")
        texts.append(_text(payload[at : at + length]))
        at += length
    if form not in (Form.BYTES, Form.FLOATS):
        raise ProtocolError(f"pixels of an unknown form {form}")
    return SentRow(number, seat, slot, Form(form), deadline, arrived, *texts), at


def numbers(kind: Kind, values: Sequence[int]) -> bytes:
    return frame(kind, 0, b"".join(NUMBER.pack(value) for value in values))


def read_numbers(payload: bytes) -> list[int]:
    if len(payload) % NUMBER.size:
        raise ProtocolError(f"expected numbers of {NUMBER.size} bytes, got {len(payload)}")
    return [value for (value,) in NUMBER.iter_unpack(payload)]


def released(seats: Mapping[int, int]) -> bytes:
    return frame(Kind.RELEASE, 0, b"".join(SEAT.pack(*seat) for seat in seats.items()))


def read_released(payload: bytes) -> list[tuple[int, int]]:
    if len(payload) % SEAT.size:
        raise ProtocolError(f"expected seats of {SEAT.size} bytes, got {len(payload)}")
    return [(number, times) for number, times in SEAT.iter_unpack(payload)]


def answer(number: int, reply: Reply) -> bytes:
    outcome = reply.outcome
    if isinstance(outcome, ServiceError):
        form, body = Form.FAULT, json.dumps(to_wire(outcome)).encode()
    elif outcome.dtype == np.float32:
        form, body = Form.FLOATS, outcome.tobytes()
    else:
        form, body = Form.DOUBLES, outcome.astype(np.float64, copy=False).tobytes()
    return frame(Kind.ANSWER, number, REPLY.pack(form, reply.left, reply.queue_s, reply.compute_s) + body)


def read_answer(payload: bytes) -> Reply:
    if len(payload) < REPLY.size:
        raise ProtocolError("an answer is cut off")
    form, left, queue_s, compute_s = REPLY.unpack_from(payload)
    body = payload[REPLY.size :]
    if form == Form.FAULT:
        return Reply(service_error(read_message(body)), bool(left), queue_s, compute_s)
    dtypes: dict[int, np.dtype[Any]] = {Form.FLOATS: np.dtype(np.float32), Form.DOUBLES: np.dtype(np.float64)}
    dtype = dtypes.get(form)
    if dtype is None or len(body) % dtype.itemsize:
        raise ProtocolError(f"an answer of form {form} with {len(body)} bytes")
    return Reply(np.frombuffer(body, dtype), bool(left), queue_s, compute_s)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("expected text") from None


# --- faults -----------------------------------------------------------------------------------------------------------


def _kinds(base: type[Exception], among: Any) -> dict[str, type[Any]]:
    return {name: kind for name, kind in vars(among).items() if isinstance(kind, type) and issubclass(kind, base)}


_SERVICE: Final = _kinds(ServiceError, errors)
_STORED: Final = _kinds(stored.StoreError, stored)


def to_wire(error: Exception) -> dict[str, Any]:
    """An error as JSON; an unforeseen one is replaced by a general one that tells nothing of the inside."""
    if not isinstance(error, ServiceError | stored.StoreError):
        error = Internal("the server failed unexpectedly; its log has the details under this request id")
    fault: dict[str, Any] = {"class": type(error).__name__, "detail": error.detail, "code": error.code}
    if isinstance(error, ServiceError):
        fault |= {"retry_after_s": error.retry_after_s, "extra": error.extra}
    return json.loads(json.dumps(fault, default=str))  # type: ignore[no-any-return]


def failure(fault: dict[str, Any]) -> Exception:
    """The error that `to_wire` described, of the same class. Raises ProtocolError."""
    kind = _STORED.get(str(fault.get("class")))
    if kind is None:
        return service_error(fault)
    error: stored.StoreError = stored.StoreError.__new__(kind)
    stored.StoreError.__init__(error, str(fault.get("detail")), code=str(fault.get("code")))
    return error


def service_error(fault: dict[str, Any]) -> ServiceError:
    kind, extra, wait_s = _SERVICE.get(str(fault.get("class"))), fault.get("extra", {}), fault.get("retry_after_s")
    if kind is None or not isinstance(extra, dict) or not isinstance(wait_s, int | float | None):
        raise ProtocolError(f"expected a fault, got one of class {str(fault.get('class'))[:100]!r}")
    error: ServiceError = kind(str(fault.get("detail")), code=str(fault.get("code")), retry_after_s=wait_s)
    error.extra = extra
    return error
