"""The multipart form of an upload, parsed while it arrives: the file goes to the disk, never into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import BadRequest, ServiceError, Unprocessable

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_LONGEST: Final = 1000  # bytes of a field that is no file
_PARTS: Final = 20


class FileForm:
    """`file` and other fields of a multipart body. `append` is called with the file's bytes as they arrive."""

    def __init__(self, content_type: str, append: Callable[[bytes], None]) -> None:
        """Raises BadRequest where the content type is another or has no boundary."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest(f"content type: expected multipart/form-data with a boundary, got {content_type[:100]!r}")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._append, self._parts = append, 0
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value, self._text = b"", b"", b""
        self._whole = self._broken = False
        self._field = ""
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())
        except FormParserError as error:
            raise BadRequest(f"multipart body: {error}") from error

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body; after a failure, ignore them. Raises BadRequest, DiskFull."""
        if self._broken:
            return
        try:
            self._parser.write(data)
        except FormParserError as error:
            self._broken = True
            raise BadRequest(f"multipart body: {error}") from error
        except ServiceError:
            self._broken = True
            raise

    def finish(self) -> None:
        """Raises BadRequest where the body ended too early, Unprocessable where it held no file."""
        if not self._whole:
            raise BadRequest("multipart body: expected it to end with its closing boundary")
        if self.filename is None:
            raise Unprocessable("expected a file in the field 'file', got none", param="file")

    @property
    def name(self) -> str:
        """The file's name, without the client's folders."""
        return (self.filename or "").replace("\\", "/").split("/")[-1]

    # --- the parser's callbacks --------------------------------------------------------------------------------------

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._headers, self._text, self._parts = {}, b"", self._parts + 1
        if self._parts > _PARTS:
            raise BadRequest(f"multipart body: expected at most {_PARTS} fields, got more")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == "file":
            if self.filename is not None:
                raise BadRequest("multipart body: expected one file, got more", param="file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            self._append(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _LONGEST:
            raise BadRequest(f"field {self._field[:100]!r}: expected at most {_LONGEST} bytes, got more")

    def _close(self) -> None:
        if self._field != "file":
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self._whole = True
