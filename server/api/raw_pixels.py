"""Pixels that a client has resized and cropped: a NumPy file (.npy), uint8 [n, S, S, 3] or [S, S, 3], RGB.

S must be the image size of the version that answers. `Lensrack-Geometry` declares how the client has cut the pixels; a
version with another geometry then answers 409 geometry_differs instead of something slightly wrong. Nothing is
unpickled: the header is matched against its grammar (NumPy's `lib.format`), never evaluated.
"""

from __future__ import annotations

import math
import re
from typing import Final

import numpy as np
from starlette.datastructures import Headers

from lensrack import wire
from server.engine.images.decode import Geometry
from server.errors import BadRequest, ServiceError, Unprocessable
from server.serving.decoding import PrecutImage

NPY: Final = "application/x-npy"

_MAGIC: Final = b"\x93NUMPY"
_LONGEST_HEADER: Final = 10_000  # NumPy's own limit
_FIELD: Final = re.compile(
    rb"\s*'(descr|fortran_order|shape)'\s*:\s*('[^']{0,20}'|True|False|\([\d,\s]{0,60}\))\s*(,|$)"
)


def is_array(body: bytes) -> bool:
    """Whether a body without a declared type is a NumPy file."""
    return body.startswith(_MAGIC)


def read(body: bytes, headers: Headers, *, most: int) -> list[PrecutImage]:
    """Return the images of an array, at most `most`. Raises BadRequest (bad_image), Unprocessable (bad_pixels)."""
    geometry = declared_geometry(headers)
    fields, start = _header(body)
    shape = _shape(fields.get(b"shape", b"()"))
    images = (1, *shape) if len(shape) == 3 else shape
    array = b" ".join(fields.get(name, b"?") for name in (b"descr", b"shape")).decode("ascii", "replace")
    if fields.get(b"descr") not in (b"'|u1'", b"'u1'") or fields.get(b"fortran_order") != b"False":
        raise Unprocessable(f"expected a uint8 array in C order, got {array}", code="bad_pixels")
    if len(images) != 4 or images[3] != 3 or images[1] != images[2] or not 1 <= images[0] <= most:
        expected = f"[n, S, S, 3] or [S, S, 3] with n from 1 to {most}"
        raise Unprocessable(f"expected pixels {expected}, got {list(shape)}", code="bad_pixels")
    if len(body) - start != math.prod(images):
        raise BadRequest(f"expected {math.prod(images)} bytes of pixels, got {len(body) - start}", code="bad_image")
    pixels = np.frombuffer(body, np.uint8, offset=start).reshape(images)
    return [PrecutImage(image, geometry) for image in pixels]


def declared_geometry(headers: Headers) -> Geometry | None:
    """Return what `Lensrack-Geometry` declares. Raises Unprocessable (bad_pixels)."""
    text = headers.get(wire.GEOMETRY_HEADER)
    if text is None:
        return None
    declared = wire.Geometry.parse(text)
    try:
        if declared is None:
            raise BadRequest(f"expected {wire.Geometry.EXAMPLE}")
        return Geometry(declared.size, declared.interpolation, declared.crop_pct, declared.crop_mode, declared.fill)
    except ServiceError as error:
        raise Unprocessable(f"{wire.GEOMETRY_HEADER}: {error.detail}, got {text[:200]!r}", code="bad_pixels") from None


def _header(body: bytes) -> tuple[dict[bytes, bytes], int]:
    """The header's fields as they are written, and the offset of the pixels."""
    if body[:6] != _MAGIC or body[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise BadRequest(f"expected a NumPy file, got one that begins with {body[:8].hex(' ')!r}", code="bad_image")
    wide = 2 if body[6] == 1 else 4
    length = int.from_bytes(body[8 : 8 + wide], "little")
    start = 8 + wide + length
    if length > _LONGEST_HEADER or start > len(body):
        raise BadRequest("the NumPy file is truncated or damaged: its header ends too early", code="bad_image")
    return _fields(body[8 + wide : start].strip()), start


def _fields(header: bytes) -> dict[bytes, bytes]:
    inside, fields, at = header[1:-1].strip(), {}, 0
    while at < len(inside) and (field := _FIELD.match(inside, at)):
        fields[field[1]], at = field[2], field.end()
    if header[:1] + header[-1:] != b"{}" or at < len(inside) or len(fields) != 3:
        raise BadRequest(
            "the NumPy file is damaged: its header does not describe an array of numbers", code="bad_image"
        )
    return fields


def _shape(text: bytes) -> tuple[int, ...]:
    return tuple(min(int(side), 2**31) for side in text[1:-1].split(b",") if side.strip().isdigit())
