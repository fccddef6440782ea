"""Resizes and crops pictures on the client, to exactly the pixels that the server would compute.

Only pictures that Pillow decodes unambiguously are resized: RGB, grey and CMYK of 8 bits without transparency or
animation. Others are sent as they are, and the server resizes them. Needs Pillow, from the extra `lensrack[resize]`.
"""

from __future__ import annotations

import io
import math
import struct
from typing import Any

from . import _images
from ._images import ImageInput
from .wire import Geometry

NPY = "application/x-npy"

_MODES = frozenset({"RGB", "L", "CMYK"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_MAX_WHOLE = 2**24  # pixels of a resized picture; the server handles larger ones differently


def encode(image: ImageInput, geometry: Geometry) -> tuple[bytes, str]:
    """Return the body for an image and its content type: resized pixels as .npy, or the image itself."""
    if not _is_file(image):
        with _images.refused():
            pixels = _resize(_from_memory(image), geometry)
        return _images.encode(image) if pixels is None else (pixels, NPY)
    data, kind = _images.encode(image)
    pixels = _resize(_from_file(data), geometry)
    return (data, kind) if pixels is None else (pixels, NPY)


def _is_file(image: Any) -> bool:
    return not (hasattr(image, "shape") or (hasattr(image, "save") and hasattr(image, "mode")))


def _from_memory(image: Any) -> Any:
    """Return a Pillow image or an array as an upright Pillow image, or None for an unsupported array."""
    from PIL import Image, ImageOps

    if hasattr(image, "shape"):
        shape, modes = tuple(int(side) for side in image.shape), {3: "RGB", 1: "L"}
        mode = modes.get(shape[2] if len(shape) == 3 else 1) if len(shape) in (2, 3) and min(shape) else None
        if mode is None or str(image.dtype) != "uint8":
            return None
        return Image.frombytes(mode, (shape[1], shape[0]), image.tobytes())
    return ImageOps.exif_transpose(image)


def _from_file(data: bytes) -> Any:
    """Return the picture of a file, upright; None if it cannot be read, or not unambiguously."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            opened.load()
            if opened.format in ("PNG", "WEBP") and getattr(opened, "is_animated", False):
                return None
            return ImageOps.exif_transpose(opened)
    except Exception:  # the server reports what is wrong with the file
        return None


def _resize(image: Any, geometry: Geometry) -> bytes | None:
    """Return an .npy file of uint8 [S, S, 3], or None for a picture that the server must resize."""
    from PIL.Image import Resampling

    method = getattr(Resampling, geometry.interpolation.upper(), None)
    if image is None or image.mode not in _MODES or "transparency" in image.info or method is None:
        return None
    size = _resized_size(image.size, geometry)
    if size is None or size[0] * size[1] > _MAX_WHOLE or min(size) < 1:
        return None
    resized = _pad(image.convert("RGB").resize(size, method), geometry)
    left, top = (round((side - geometry.size) / 2) for side in resized.size)
    return _npy(resized.crop((left, top, left + geometry.size, top + geometry.size)).tobytes(), geometry.size)


def _resized_size(size: tuple[int, int], geometry: Geometry) -> tuple[int, int] | None:
    """Return width and height before the crop, as timm's evaluation transform does; None for an unknown crop mode."""
    (width, height), side = size, math.floor(geometry.size / geometry.crop_pct)
    if geometry.crop_mode == "squash":
        return side, side
    if geometry.crop_mode == "border":
        ratio = max(width / side, height / side)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    if geometry.crop_mode != "center":
        return None
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def _pad(image: Any, geometry: Geometry) -> Any:
    """Pad to at least the size of the crop; an odd pixel goes to the right or the bottom."""
    from PIL import Image

    (width, height), size = image.size, geometry.size
    if width >= size and height >= size:
        return image
    canvas = Image.new("RGB", (max(width, size), max(height, size)), geometry.fill)
    canvas.paste(image, (max(0, size - width) // 2, max(0, size - height) // 2))
    return canvas


def _npy(pixels: bytes, size: int) -> bytes:
    """Return a file in NumPy's format, version 1: the header ends with a newline at a multiple of 64 bytes."""
    fields = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size}, {size}, 3), }}".encode()
    header = fields + b" " * (-(len(fields) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pixels
