"""The one way from bytes to pixels, for training and for serving.

    bytes ─decode─► RGB picture, upright ─fit─► uint8 [S, S, 3]

`decode` treats its input as hostile: allow-listed formats, sizes checked before a pixel is decoded. `fit` cuts exactly as
timm's evaluation transform does. Normalisation is not done here: uint8 crosses to the device, see `engine.normalise`.

Decisions: of an animation the first frame counts; transparency is laid on white; colour profiles are ignored, as they
are by the transforms that backbones are pretrained with.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from server.errors import BadRequest, TooLarge, UnsupportedMedia

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP")
MAX_SIDE: Final = 32_768
MAX_ASPECT: Final = 100  # beyond it the short side's resize would blow up the long one: 1×100000 → 224×22400000
MAX_SCANS: Final = 200  # a progressive JPEG's scans each cost a pass over the whole picture; real files have about ten

Image.MAX_IMAGE_PIXELS = None  # our own check, below, is stricter, and an error rather than a warning

_INTERPOLATION: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAGIC: Final = (  # what people send by mistake, to be able to say so
    (0, b"GIF8", "a GIF"),
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"<svg", "an SVG"),
    (0, b"<?xml", "XML or an SVG"),
    (0, b"<!DOCTYPE html", "an HTML page"),
    (0, b"<html", "an HTML page"),
    (0, b"{", "JSON"),
)


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a square of `size` pixels. `fill` is the colour of a border (crop mode `border` only)."""

    size: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    fill: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(
        cls, size: int, interpolation: str, crop_pct: float, crop_mode: str, mean: tuple[float, float, float]
    ) -> Geometry:
        """timm fills borders with the normalisation's mean; other modes have no border, and so compare equal."""
        red, green, blue = (round(255 * value) for value in mean)
        return cls(size, interpolation, crop_pct, crop_mode, (red, green, blue) if crop_mode == "border" else (0, 0, 0))


def pixels(data: bytes, geometry: Geometry, *, max_pixels: int) -> NDArray[np.uint8]:
    """Encoded picture to uint8 [S, S, 3]."""
    return fit(decode(data, max_pixels=max_pixels), geometry)


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """An encoded picture as upright RGB.

    Raises UnsupportedMedia (unsupported_image), TooLarge (image_too_large), BadRequest (bad_image).
    """
    if not data:
        raise BadRequest("expected an image, got 0 bytes", code="bad_image")
    image = _open(data)
    _check_size(image.width, image.height, max_pixels)
    if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:  # the marker cannot occur in coded data
        raise BadRequest(f"the JPEG has more than {MAX_SCANS} scans", code="bad_image")
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:  # decoders fail in many ways on hostile bytes; all mean the same to the sender
        raise BadRequest(f"the image is truncated or corrupt: {_reason(error)}", code="bad_image") from error


def fit(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """Resize and crop as timm's evaluation transform. RGB picture → uint8 [S, S, 3], contiguous."""
    scaled = math.floor(geometry.size / geometry.crop_pct)
    size = _scaled_size(image.width, image.height, scaled, geometry.crop_mode)
    resized = image.resize(size, _INTERPOLATION[geometry.interpolation]) if size != image.size else image
    return _center(np.asarray(resized), geometry.size, geometry.fill)


def _scaled_size(width: int, height: int, scaled: int, crop_mode: str) -> tuple[int, int]:
    if crop_mode == "squash":
        return scaled, scaled
    if crop_mode == "border":  # the longest side meets the target
        ratio = max(height / scaled, width / scaled)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    if width <= height:  # the shortest side meets the target
        return scaled, int(scaled * height / width)
    return int(scaled * width / height), scaled


def _center(array: NDArray[np.uint8], size: int, fill: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Crop to the middle; where the picture is smaller, pad with `fill` (odd pixels go to the right and the bottom)."""
    height, width = array.shape[:2]
    if width < size or height < size:
        canvas = np.empty((max(height, size), max(width, size), 3), np.uint8)
        canvas[...] = fill
        top, left = max(0, (size - height) // 2), max(0, (size - width) // 2)
        canvas[top : top + height, left : left + width] = array
        array, (height, width) = canvas, canvas.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(array[top : top + size, left : left + size])


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # see decode
        if _has_magic(data):
            raise BadRequest(f"the image is truncated or corrupt: {_reason(error)}", code="bad_image") from error
        raise UnsupportedMedia(
            f"expected a picture as {', '.join(FORMATS)}, got {_looks_like(data)}", code="unsupported_image"
        ) from error


def _has_magic(data: bytes) -> bool:
    """Whether it began as one of our formats and then went wrong."""
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")) or (
        data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    )


def _looks_like(data: bytes) -> str:
    start = data[:64].lstrip() if data[:1].isspace() else data[:64]
    for offset, magic, name in _MAGIC:
        if start[offset : offset + len(magic)].lower() == magic.lower():
            return name
    return f"{len(data)} bytes of something else"


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadRequest(f"the image has no pixels: {width}×{height}", code="bad_image")
    if width > MAX_SIDE or height > MAX_SIDE or width * height > max_pixels:
        raise TooLarge(
            f"the image is {width}×{height} pixels: expected at most {max_pixels} pixels and {MAX_SIDE} a side",
            code="image_too_large",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadRequest(
            f"the image is {width}×{height}: expected sides within {MAX_ASPECT}:1 of each other", code="bad_image"
        )


def _upright(image: Image.Image) -> Image.Image:
    """EXIF orientation applied; broken EXIF is no reason to refuse a picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is free-form bytes of whatever camera; the pixels are sound
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: keep the high byte; Pillow's own conversion would clip
        high = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(high.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    """What the decoder said, where it is a sentence; never an object's address or a path."""
    text = str(error)
    return text if text and len(text) < 120 and "<" not in text and "/" not in text else type(error).__name__
