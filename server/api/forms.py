"""Multipart bodies (RFC 7578), parsed while they arrive, by what each part is and not by how its client spelled it.

A part is a file if it says so by a filename, `filename*` alone included, or by a content type. Without either it is a
file where the form's only file is expected under that name, or where its bytes are no text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from email.utils import collapse_rfc2231_value
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import BadRequest, ServiceError, Unprocessable

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM: Final = "multipart/form-data"
_LONGEST: Final = 1000  # bytes of a field that is no file, unless a form says otherwise
_PARTS: Final = 20


@dataclass
class Part:
    """One part: the field's name, what declares it a file, and its bytes, unless they go elsewhere as they arrive."""

    name: str
    filename: str | None
    media_type: str
    data: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, head: Message) -> Part:
        """Raises Unprocessable for a part that does not say which field it is."""
        if "content-disposition" not in head:
            raise Unprocessable("multipart body: expected Content-Disposition: form-data in each part, got one without")
        name = collapse_rfc2231_value(head.get_param("name", "", "content-disposition"))
        if not name.isprintable():
            raise Unprocessable(f"multipart body: expected a field's name of printable characters, got {name[:100]!r}")
        kind = head.get_content_type() if "content-type" in head else ""
        return cls(name.partition("[")[0] or name, head.get_filename(), kind)  # `images[]`, `images[0]`: PHP's lists

    @property
    def is_file(self) -> bool:
        return self.filename is not None or self.media_type not in ("", "text/plain") or self.text is None

    @property
    def text(self) -> str | None:
        """The bytes as UTF-8, None where they are none."""
        try:
            text = self.data.decode()
        except UnicodeDecodeError:
            return None
        return None if "\0" in text else text


class FormReader:
    """Parses a multipart body that is fed to it. `most`: parts. Subclasses may take the parts as they come."""

    def __init__(self, content_type: str, most: int) -> None:
        """Raises BadRequest where the content type is another or has no boundary."""
        kind, options = parse_options_header(content_type)
        if kind != FORM.encode() or not options.get(b"boundary"):
            raise BadRequest(f"content type: expected {FORM} with a boundary, got {content_type[:100]!r}")
        self.parts: list[Part] = []
        self._most, self._got = most, 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._name, self._value = b"", b""
        self._whole = self._broken = False
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())
        except FormParserError as error:
            raise BadRequest(f"multipart body: {error}") from error

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body; after a failure, ignore them. Raises ServiceError kinds."""
        if self._broken:
            return
        self._got += len(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            self._broken = True
            raise BadRequest(f"multipart body: {error}") from error
        except ServiceError:
            self._broken = True
            raise

    def finish(self) -> None:
        """Raises BadRequest where the body ended too early."""
        if not self._whole:
            detail = f"expected it to end with its closing boundary, got {self._got} bytes without"
            raise BadRequest(f"multipart body: {detail}")

    def opened(self, part: Part) -> None:
        """A part has begun."""

    def append(self, part: Part, data: bytes) -> None:
        part.data += data

    # --- the parser's callbacks --------------------------------------------------------------------------------------

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._headers = []
        if len(self.parts) == self._most:
            raise BadRequest(f"multipart body: expected at most {self._most} fields, got more")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers.append((self._name, self._value))
        self._name = self._value = b""

    def _open(self) -> None:
        head = Message()  # of the library, because the parser's own function does not know `filename*` (RFC 8187)
        for name, value in self._headers:
            head[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        self.parts.append(Part.of(head))
        self.opened(self.parts[-1])

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.append(self.parts[-1], data[start:end])

    def _end(self) -> None:
        self._whole = True


def read(body: bytes, content_type: str, *, most: int) -> list[Part]:
    """Return the parts of a whole body, at most `most`. Raises BadRequest, Unprocessable."""
    reader = FormReader(content_type, most)
    reader.feed(body)
    reader.finish()
    return reader.parts


def files(parts: list[Part], name: str) -> list[Part]:
    """Return a form's files: all in the field `name`, or all in one other field. Raises Unprocessable.

    Nothing else may be in the form, so that nobody takes for heard what is not.
    """
    if not parts:
        raise Unprocessable(f"multipart body: expected files in the field {name!r}, got none")
    for part in parts:
        if not part.is_file:
            text = bytes(part.data[:40]).decode("utf-8", "replace")
            detail = f"expected only files, in the field {name!r}, got the text {text!r} in {part.name[:100]!r}"
            raise Unprocessable(f"multipart body: {detail}; a file has a filename, as curl -F '{name}=@FILE' sends")
    if len(names := {part.name for part in parts}) > 1:
        others = " and ".join(repr(other[:100]) for other in sorted(names)[:3])
        raise Unprocessable(f"multipart body: expected files in the one field {name!r}, got {others}")
    return parts


class FileForm(FormReader):
    """One file and other fields. `append_file` is called with the file's bytes as they arrive: to the disk, never into
    memory. The file may be in any field, if it says that it is one; in the field `file` it need not."""

    def __init__(self, content_type: str, append_file: Callable[[bytes], None]) -> None:
        """Raises BadRequest where the content type is another or has no boundary."""
        super().__init__(content_type, _PARTS)
        self._append_file = append_file
        self._file: Part | None = None

    def opened(self, part: Part) -> None:
        if part.name == "file" or part.filename is not None or part.media_type not in ("", "text/plain"):
            if self._file is not None:
                raise BadRequest("multipart body: expected one file, got more", param="file")
            self._file = part

    def append(self, part: Part, data: bytes) -> None:
        if part is self._file:
            self._append_file(data)
            return
        part.data += data
        if len(part.data) > _LONGEST:
            detail = f"expected at most {_LONGEST} bytes, got more; a file is named 'file' or has a filename"
            raise BadRequest(f"field {part.name[:100]!r}: {detail}")

    def finish(self) -> None:
        """Raises BadRequest where the body ended too early, Unprocessable where it held no file."""
        super().finish()
        if self._file is None:
            raise Unprocessable("expected a file in the field 'file', got none", param="file")

    @property
    def fields(self) -> dict[str, str]:
        texts = (part for part in self.parts if part is not self._file)
        return {part.name: part.data.decode("utf-8", "replace") for part in texts}

    @property
    def name(self) -> str:
        """The file's name, without the client's folders."""
        filename = self._file.filename if self._file else None
        return (filename or "").replace("\\", "/").split("/")[-1]
