"""Encodes any kind of image input as bytes and a content type.

Files and bytes are sent unchanged; Pillow images and arrays are sent as PNG, which is lossless. Neither Pillow nor
numpy is imported: an array is recognised by its shape and dtype. Whatever a caller's picture raises, from a truncated
file that Pillow reads late to a closed file object, becomes InvalidInput.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from .errors import InvalidInput


class PillowImage(Protocol):
    """The part of `PIL.Image.Image` that is used here."""

    @property
    def mode(self) -> str: ...
    def convert(self, mode: str) -> Any: ...
    def save(self, fp: Any, format: str | None = None) -> None: ...  # noqa: A002 - Pillow's word


class Array(Protocol):
    """A uint8 array [H, W, 3] (RGB), [H, W, 4] (RGBA), [H, W, 1] or [H, W] (grey)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def tobytes(self) -> bytes: ...


ImageInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PillowImage | Array

UNKNOWN_TYPE = "application/octet-stream"
_SIGNATURES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"BM", "image/bmp"),
    (b"GIF8", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
)
_PNG_MODES = frozenset({"L", "LA", "P", "RGB", "RGBA", "I;16"})  # the server keeps the high byte of 16 bits
_LOSSLESS = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA"}  # other modes lose nothing in RGB
_PNG_COLOUR = {1: 0, 3: 2, 4: 6}  # channels -> colour type, PNG specification section 11.2.2


def encode(image: ImageInput) -> tuple[bytes, str]:
    """Return an image's bytes and their content type, sniffed from the bytes. Raises InvalidInput."""
    with refused():
        data = _bytes_of(image)
    return data, sniff(data)


@contextmanager
def refused() -> Iterator[None]:
    """Turn whatever a caller's picture raises into InvalidInput."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"cannot read the image: {str(error) or type(error).__name__}") from error


def sniff(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), UNKNOWN_TYPE)


def _bytes_of(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return _not_empty(bytes(image), "the image is empty (0 bytes)")
    if isinstance(image, str | os.PathLike):
        if isinstance(image, str) and image.partition("://")[0].lower() in {"http", "https", "data", "ftp", "s3"}:
            raise InvalidInput(f"an image is never fetched from a URL, got {image[:100]!r}: pass a path or the bytes")
        return _read_path(Path(image))
    if hasattr(image, "save") and hasattr(image, "mode"):
        return _pillow_png(image)
    if hasattr(image, "tobytes") and hasattr(image, "shape"):
        return _array_png(image)
    if hasattr(image, "read"):
        return _read_file(image)
    kinds = "a path, bytes, a binary file, a Pillow image or a uint8 array [H, W, 3]"
    raise InvalidInput(f"an image is {kinds}, not {type(image).__name__}")


def _read_path(path: Path) -> bytes:
    try:
        return _not_empty(path.read_bytes(), f"the image {path} is empty (0 bytes)")
    except OSError as error:
        raise InvalidInput(f"cannot read the image {path}: {error.strerror or error}") from error


def _read_file(file: Any) -> bytes:
    data = file.read()
    if not isinstance(data, bytes):
        raise InvalidInput(f"the image file must be opened in binary mode: read() returned {type(data).__name__}")
    return _not_empty(data, "the image file is empty (0 bytes), or was read to its end before: seek(0) starts it again")


def _not_empty(data: bytes, refusal: str) -> bytes:
    if not data:
        raise InvalidInput(refusal)
    return data


def _pillow_png(image: Any) -> bytes:
    from PIL import ImageOps  # installed, or there would be no Pillow image

    upright = ImageOps.exif_transpose(image)  # PNG readers may ignore EXIF; in a JPEG file the server would apply it
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright = _of_16_bits(upright)
    elif upright.mode == "F":
        raise InvalidInput(
            "a Pillow image of mode F has no defined range: convert it to 8 bits first, such as values from 0 to 1 "
            "by image.point(lambda value: value * 255).convert('L')"
        )
    elif upright.mode not in _PNG_MODES:
        upright = upright.convert(_LOSSLESS.get(upright.mode, "RGB"))
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _of_16_bits(image: Any) -> Any:
    """Return grey of 16 bits, of any byte order, as mode I;16. Raises InvalidInput for 32 bits of another range."""
    if image.mode == "I;16":
        return image
    if image.mode != "I":  # by its bytes: Pillow clips some of the byte orders at 255 when it converts them
        from PIL import Image

        return Image.frombytes("I;16", image.size, image.tobytes(), "raw", image.mode.replace("I;16L", "I;16"))
    low, high = image.getextrema()
    if low < 0 or high > 65535 or 0 < high < 256:  # up to 255: eight bits, or sixteen and nearly black
        raise InvalidInput(
            f"a Pillow image of mode I has no defined range, and the values of this one are {low} to {high}: convert "
            "it first, values up to 255 by image.convert('L'), up to 65535 by image.convert('I;16')"
        )
    return image.convert("I;16")


def _array_png(array: Array) -> bytes:
    shape = tuple(int(n) for n in array.shape)
    height, width, channels = shape if len(shape) == 3 else (*shape, 1) if len(shape) == 2 else (0, 0, 0)
    if str(array.dtype) != "uint8" or channels not in _PNG_COLOUR or not height or not width:
        raise InvalidInput(f"an array must be uint8 [H, W, 3], not {array.dtype} {list(shape)}{_how(array, shape)}")
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOUR[channels], 0, 0, 0)
    pixels, stride = array.tobytes(), width * channels
    rows = b"".join(b"\x00" + pixels[start : start + stride] for start in range(0, len(pixels), stride))
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _how(array: Array, shape: tuple[int, ...]) -> str:
    """Return how to make an array of another kind one that can be sent."""
    kind = str(array.dtype).lstrip("<>=")
    if kind in ("uint16", "u2"):
        return ": (array >> 8).astype('uint8') keeps the high byte of 16 bits"
    if kind == "bool":
        return ": array.astype('uint8') * 255 makes it black and white"
    if kind != "uint8":
        return ": scale it to 0..255, then array.astype('uint8'); values from 0 to 1 by (array * 255).round()"
    if len(shape) == 3 and shape[0] in _PNG_COLOUR and 0 < shape[0] < min(shape[1:]):
        return ": array.transpose(1, 2, 0) puts the channels last"
    return ": a batch is a list of arrays" if len(shape) == 4 else ""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
