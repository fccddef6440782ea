"""Encodes any kind of image input as bytes and a content type.

Files and bytes are sent unchanged; Pillow images and arrays are sent as PNG, which is lossless. Neither Pillow nor
numpy is imported: an array is recognised by its shape and dtype.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
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
_PNG_MODES = frozenset({"L", "LA", "P", "RGB", "RGBA"})
_PNG_COLOUR = {1: 0, 3: 2, 4: 6}  # channels -> colour type, PNG specification section 11.2.2


def encode(image: ImageInput) -> tuple[bytes, str]:
    """Return an image's bytes and their content type, sniffed from the bytes. Raises InvalidInput."""
    data = _bytes_of(image)
    return data, sniff(data)


def sniff(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), UNKNOWN_TYPE)


def _bytes_of(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
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
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read the image {path}: {error.strerror or error}") from error


def _read_file(file: Any) -> bytes:
    data = file.read()
    if not isinstance(data, bytes):
        raise InvalidInput(f"the image file must be opened in binary mode: read() returned {type(data).__name__}")
    return data


def _pillow_png(image: Any) -> bytes:
    from PIL import ImageOps  # installed, or there would be no Pillow image

    upright = ImageOps.exif_transpose(image)  # PNG readers may ignore EXIF; in a JPEG file the server would apply it
    if upright.mode not in _PNG_MODES:
        upright = upright.convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _array_png(array: Array) -> bytes:
    shape = tuple(int(n) for n in array.shape)
    height, width, channels = shape if len(shape) == 3 else (*shape, 1) if len(shape) == 2 else (0, 0, 0)
    if str(array.dtype) != "uint8" or channels not in _PNG_COLOUR or not height or not width:
        raise InvalidInput(f"an array must be uint8 [H, W, 3], not {array.dtype} {list(shape)}")
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOUR[channels], 0, 0, 0)
    pixels, stride = array.tobytes(), width * channels
    rows = b"".join(b"\x00" + pixels[start : start + stride] for start in range(0, len(pixels), stride))
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
