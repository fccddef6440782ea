"""Checks the pages of a parquet file before a library unpacks any of them.

A page's header says how much it unpacks to, and the library allocates that much. So every page header of the columns
that will be read is parsed here first, and must keep to the limits. Sources: parquet-format (PageHeader in
parquet.thrift), Thrift compact protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Final

from .metering import Limits, bad_archive

MAGIC: Final = b"PAR1"
MAX_PAGE_BYTES: Final = 256 * 2**20  # unpacked; a page of a hundred photographs has a few MiB
MAX_HEADER_BYTES: Final = 2**20
MAX_DEPTH: Final = 8  # of structures in a page's header
SMALLEST_VALUE: Final = 4  # bytes in a dictionary: an int32, or the length of a text

_WINDOW: Final = 2**14
_PAGE_TYPE, _UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 1, 2, 3, 5, 7, 8  # fields of PageHeader
_I32, _LIST, _SET, _MAP, _STRUCT = 5, 9, 10, 11, 12  # types of the compact protocol
_FIXED: Final = {1: 0, 2: 0, 3: 1, 7: 8, 13: 16}  # bytes of true, false, byte, double, uuid in a field

Fields = dict[int, "int | Fields"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column's part of a row group: where its pages are (bytes), and how many values they hold."""

    name: str
    start: int
    length: int
    values: int


def largest_page(file: BinaryIO, chunk: Chunk, limits: Limits) -> int:
    """The unpacked size in bytes of a chunk's largest page. Raises `BadRequest` bad_archive for a bomb or damage."""
    at, end, unpacked, values, largest = chunk.start, chunk.start + chunk.length, 0, 0, 0
    allowed = max(limits.ratio_free_bytes, chunk.length * limits.max_ratio)
    while at < end:
        header, size = _page_header(file, at, end, chunk)
        page, packed = _number(header, _UNPACKED, chunk), _number(header, _PACKED, chunk)
        if page > MAX_PAGE_BYTES:
            problem = f"column {chunk.name!r} has a page of {page:,} bytes; at most {MAX_PAGE_BYTES:,} are allowed"
            raise bad_archive(f"the parquet file's {problem} (write smaller row groups)")
        unpacked += page
        if unpacked > allowed:
            problem = f"column {chunk.name!r} unpacks to more than {limits.max_ratio:g} times its size"
            raise bad_archive(f"the parquet file's {problem}, as a bomb does")
        values += _values(header, page, chunk)
        largest = max(largest, page)
        at += size + packed
    if at != end or values != chunk.values:
        raise _damaged(chunk, f"its pages hold {values:,} values in {at - chunk.start:,} bytes")
    return largest


def _values(header: Fields, page: int, chunk: Chunk) -> int:
    """The number of column values in a page. A dictionary's entries do not count, but must fit into the page."""
    dictionary = header.get(_DICTIONARY)
    if isinstance(dictionary, dict) and _number(dictionary, 1, chunk) * SMALLEST_VALUE > page:
        raise _damaged(chunk, "a dictionary claims more values than it has bytes for")
    data = [header[field] for field in (_DATA, _DATA_V2) if field in header]
    return sum(_number(part, 1, chunk) for part in data if isinstance(part, dict))


def _number(fields: Fields, field: int, chunk: Chunk) -> int:
    value = fields.get(field)
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise _damaged(chunk, "a page's header lacks a number")
    return value


def _page_header(file: BinaryIO, at: int, end: int, chunk: Chunk) -> tuple[Fields, int]:
    """The header's fields and its own size in bytes."""
    window = _WINDOW
    while True:
        file.seek(at)
        data = file.read(min(window, end - at))
        try:
            reader = _Compact(data)
            return reader.struct(), reader.at
        except IndexError:  # the header is longer than the window
            if len(data) < window or window >= MAX_HEADER_BYTES:
                raise _damaged(chunk, "a page's header has no end") from None
            window *= 8
        except ValueError as error:
            raise _damaged(chunk, str(error)) from error


def _damaged(chunk: Chunk, why: str) -> Exception:
    return bad_archive(f"the parquet file's column {chunk.name!r} is damaged or truncated: {why}")


class _Compact:
    """Parser of Thrift's compact protocol: returns the 32-bit numbers of nested structures and skips everything else.

    Raises IndexError at the end of the data, ValueError for what no page header contains.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> Fields:
        if depth > MAX_DEPTH:
            raise ValueError("a page's header is nested too deeply")
        fields: Fields = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            if field in fields:
                raise ValueError("a page's header has a field twice")
            value = self._value(head & 15, depth)
            if value is not None:
                fields[field] = value
        return fields

    def _value(self, kind: int, depth: int) -> int | Fields | None:
        if kind == _I32:
            return self._zigzag()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        self._skip_value(kind, depth)
        return None

    def _skip_value(self, kind: int, depth: int) -> None:
        if kind in _FIXED:
            self._skip(_FIXED[kind])
        elif kind in (4, 6):
            self._varint()
        elif kind == 8:
            self._skip(self._varint())
        elif kind in (_LIST, _SET):
            self._skip_list(depth)
        else:
            raise ValueError(f"a page's header has a field of type {kind}")

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._varint()
        for _ in range(count):
            if head & 15 in (1, 2):
                self._skip(1)  # in a list, a truth value takes a byte
            else:
                self._value(head & 15, depth + 1)

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a page's header has a number without an end")

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
