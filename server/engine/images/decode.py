"""The one path from bytes to pixels, for training and serving alike.

    bytes ─decode─► RGB picture, upright ─fit─► uint8 [S, S, 3] ──► the engine, which normalises

`decode` takes JPEG, PNG, WebP and BMP, recognised by their content and never by name or declared type. Its checks run
in this order, all before a pixel is decoded:
    empty or too short for a header         BadRequest 400        bad_image
    another format                          UnsupportedMedia 415  unsupported_image
    too many pixels, too long a side        TooLarge 413          image_too_large
    truncated or damaged                    BadRequest 400        bad_image
Rules of decoding:
- The orientation of EXIF, else of XMP, is applied (see `orientation`); what is broken of them is ignored. ICC profiles
  are ignored, as they are in pretraining.
- Transparency is laid on white. A BMP whose alpha is 0 everywhere is opaque: its writer left those bytes unused.
- Of an animated WebP the first frame counts, of an animated PNG the default image.
- 16-bit samples keep their high byte. CMYK and YCCK become RGB without a profile, inverted as Adobe writes them.
- Run-length BMP and JPEG of other than 8 bits are unsupported_image.
A JPEG damaged inside its compressed data that still ends properly decodes to a damaged picture: the decoder repairs
what it can and reports no error.

Everything here may run in any number of threads: no global state of Pillow or of `warnings` is touched.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from server.errors import BadRequest, TooLarge, Unprocessable, UnsupportedMedia

from .sniff import check_size, damaged, sniff, strip, truncated

Pixels = npt.NDArray[np.uint8]

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")
_MAX_SIDE = 8192  # pixels of `Geometry.resized`: bounds the memory that a bundle can make the server allocate
MAX_NORMALISED = 1000.0  # largest magnitude of a normalised pixel; real ones are within a few units of 0
_MAX_WHOLE = 2**24  # pixels of a resized picture (64 MiB); of a larger one only the crop is computed


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a square of `size` pixels a side, in timm's terms.

    `crop_pct` is the share of the resized picture that the crop keeps. `crop_mode`: `center` resizes the shorter side
    and crops, `squash` resizes both, `border` resizes the longer and pads with the colour `fill`. Errors: bad_bundle,
    because a geometry comes from a bundle.
    """

    size: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _expect(self.interpolation in _INTERPOLATIONS, "interpolation", self.interpolation, tuple(_INTERPOLATIONS))
        _expect(self.crop_mode in _CROP_MODES, "crop_mode", self.crop_mode, _CROP_MODES)
        _expect(1 <= self.size <= _MAX_SIDE, "size", self.size, f"1 to {_MAX_SIDE}")
        fits = self.crop_pct > 0 and 1 <= self.size / self.crop_pct <= _MAX_SIDE
        _expect(fits, "crop_pct", self.crop_pct, f"size / crop_pct from 1 to {_MAX_SIDE}")

    @classmethod
    def of(
        cls, size: int, interpolation: str, crop_pct: float, crop_mode: str, mean: tuple[float, float, float]
    ) -> Geometry:
        """The geometry with timm's border colour, the normalisation's mean; other modes have no border, and so compare
        equal."""
        red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
        return cls(size, interpolation, crop_pct, crop_mode, (red, green, blue) if crop_mode == "border" else (0, 0, 0))

    def __str__(self) -> str:
        return f"{self.size} pixels, {self.interpolation}, crop_pct {self.crop_pct:g}, {self.crop_mode}, {self.fill}"

    @property
    def resized(self) -> int:
        """Pixels of the side that is resized (see `crop_mode`), before the crop."""
        return math.floor(self.size / self.crop_pct)


def _expect(holds: bool, name: str, actual: object, expected: object) -> None:
    if not holds:
        raise BadRequest(f"preprocess: {name} is {actual!r}, expected {expected}", code="bad_bundle")


def pixels(data: bytes, geometry: Geometry, *, max_pixels: int, margin: float = math.inf) -> Pixels:
    """The pixels of an encoded image, uint8 [S, S, 3]. Errors: as `decode`.

    margin: a JPEG may be decoded at a reduced size that is still `margin` times what `geometry` resizes to: cheaper for
    large pictures, with slightly different pixels. Infinite: exactly what training saw.
    """
    min_side = math.ceil(geometry.resized * margin) if math.isfinite(margin) else 0
    return fit(decode(data, max_pixels=max_pixels, min_side=min_side), geometry)


def of_picture(picture: Pixels, geometry: Geometry, *, max_pixels: int) -> Pixels:
    """As `pixels`, for a picture that came decoded, uint8 [H, W, 3]. Errors: bad_image, image_too_large."""
    height, width = picture.shape[:2]
    check_size(width, height, max_pixels)
    return fit(Image.fromarray(picture), geometry)


def of_tensor(tensor: npt.NDArray[np.float32], geometry: Geometry) -> npt.NDArray[np.float32]:
    """Check a tensor that the client has normalised, float32 [3, S, S], and return it unchanged.

    Errors: invalid_request for another size, or for numbers outside of any normalised picture, which could overflow.
    """
    expected = (3, geometry.size, geometry.size)
    if tensor.shape != expected:
        raise Unprocessable(f"expected a normalised picture of shape {list(expected)}, got {list(tensor.shape)}")
    if not (np.abs(tensor) <= MAX_NORMALISED).all():  # so that NaN fails as well
        raise Unprocessable(f"expected numbers from -{MAX_NORMALISED:g} to {MAX_NORMALISED:g}, got others or NaN")
    return tensor


# --- bytes to picture -------------------------------------------------------------------------------------------------

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    # the classes themselves: Image.open would add a size check of its own, which warns
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
# what decoders raise for hostile bytes; not MemoryError, which is not the sender's fault
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


def decode(data: bytes, *, max_pixels: int, min_side: int = 0) -> Image.Image:
    """The picture in `data`: RGB, upright. Errors: bad_image, unsupported_image, image_too_large (see the module).

    min_side: if not 0, a JPEG is decoded at a half, a quarter or an eighth of its size, as long as both sides keep so
    many pixels.
    """
    image_format = sniff(data)
    stripped = strip(data, image_format, max_pixels=max_pixels)
    image = _flatten(_load(stripped.body, image_format, max_pixels, min_side), image_format)
    turn = _TURNS.get(stripped.orientation)
    return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _load(body: bytes, image_format: str, max_pixels: int, min_side: int) -> Image.Image:
    try:
        image = _PLUGINS[image_format](io.BytesIO(body))
        _check_opened(image, image_format, max_pixels)
        if min_side and image_format == "JPEG":
            image.draft(
                image.mode, (min_side, min_side)
            )  # libjpeg skips coefficients that the smaller size does not need
        image.load()
    except Image.DecompressionBombError:
        raise TooLarge("the image has more pixels than its decoder accepts", code="image_too_large") from None
    except _DECODER_ERRORS as error:
        if "truncated" in str(error):
            raise truncated(image_format) from error
        raise damaged(image_format, "it cannot be decoded") from error
    if image_format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _transparent_sample(image, depth=body[24])
    return image


def _check_opened(image: ImageFile.ImageFile, image_format: str, max_pixels: int) -> None:
    check_size(*image.size, max_pixels)
    if image_format == "BMP" and image.info.get("compression") in (1, 2):
        # Pillow expands run lengths in Python: seconds of the interpreter's time for a few kilobytes
        raise UnsupportedMedia("expected an uncompressed BMP, this is run-length encoded", code="unsupported_image")


def _transparent_sample(image: Image.Image, depth: int) -> object:
    """PNG's transparent colour (tRNS) on the scale of the decoded samples; Pillow leaves it on the file's scale."""
    colour = image.info["transparency"]
    if image.mode == "L" and depth in (2, 4):
        return colour * (255 // (2**depth - 1))
    if image.mode == "RGB" and depth == 16:
        return tuple(sample >> 8 for sample in colour)
    return colour


def _flatten(image: Image.Image, image_format: str) -> Image.Image:
    """Convert to RGB, transparency on white."""
    if image.mode == "I;16":
        return _flatten_16_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy an RGB image
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # `convert` would copy it
    alpha = rgba.getchannel("A")
    low, high = alpha.getextrema()
    if low == 255 or (image_format == "BMP" and high == 0):
        return rgba.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=alpha)
    return white


def _flatten_16_bit(image: Image.Image) -> Image.Image:
    """16-bit greyscale to RGB: Pillow's own conversion clips at 255 instead of scaling."""
    samples = np.asarray(image)
    grey = (samples >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[samples == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


# --- picture to square ------------------------------------------------------------------------------------------------


def fit(image: Image.Image, geometry: Geometry) -> Pixels:
    """The output of timm's evaluation transform before it normalises, value for value: uint8 [S, S, 3], C-contiguous.

    Only if the resized picture would exceed 2²⁴ pixels (a strip 256 times as long as wide) is the crop computed alone:
    then `nearest` may take a pixel's neighbour, and the others may differ by a few levels, because rounding and
    clipping between Pillow's two passes fall differently.
    """
    size, (width, height) = geometry.size, _resized_size(image, geometry)
    method = _INTERPOLATIONS[geometry.interpolation]
    if width * height > _MAX_WHOLE:
        return np.array(_pad(_resize_middle(image, (width, height), size, method), size, geometry.fill))
    padded = _pad(image.resize((width, height), method), size, geometry.fill)
    left, top = (round((side - size) / 2) for side in padded.size)
    return np.array(padded.crop((left, top, left + size, top + size)))


def whole(image: Image.Image, side: int, interpolation: str) -> Pixels:
    """The whole picture with its shorter side resized to `side`: uint8 [h, w, 3], as torchvision's Resize returns it.

    Of a strip that would exceed 2²⁴ pixels only the middle.
    """
    short, longest = min(image.size), max(side, _MAX_WHOLE // side)
    kept = [min(length, max(1, short * longest // side)) for length in image.size]
    left, top = ((length - part) // 2 for length, part in zip(image.size, kept, strict=True))
    image = image.crop((left, top, left + kept[0], top + kept[1]))
    return np.array(image.resize(_shorter_to(image.size, side), _INTERPOLATIONS[interpolation]))


def _resized_size(image: Image.Image, geometry: Geometry) -> tuple[int, int]:
    side, (width, height) = geometry.resized, image.size
    if geometry.crop_mode == "squash":
        return side, side
    if geometry.crop_mode == "border":
        ratio = max(width / side, height / side)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    return _shorter_to(image.size, side)


def _shorter_to(size: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _pad(image: Image.Image, size: int, fill: tuple[int, int, int]) -> Image.Image:
    """Pad to at least `size` a side; an odd pixel goes to the right and the bottom."""
    width, height = image.size
    if width >= size and height >= size:
        return image
    canvas = Image.new("RGB", (max(width, size), max(height, size)), fill)
    canvas.paste(image, (max(0, size - width) // 2, max(0, size - height) // 2))
    return canvas


def _resize_middle(image: Image.Image, resized: tuple[int, int], size: int, method: Image.Resampling) -> Image.Image:
    """The middle `size` × `size` of `image` resized to `resized`, computed without the rest."""
    (left, x0, x1, right), (top, y0, y1, bottom) = (
        _middle(*sides, size) for sides in zip(image.size, resized, strict=True)
    )
    part = image.crop((left, top, right, bottom))
    kept = min(size, resized[0]), min(size, resized[1])
    return part.resize(kept, method, box=(x0 - left, y0 - top, x1 - left, y1 - top))


def _middle(source: int, resized: int, size: int) -> tuple[int, float, float, int]:
    """For one side: where the middle `size` of `resized` lies in `source`, with whole pixels around it for the
    filter."""
    scale, start = source / resized, round((resized - min(size, resized)) / 2)
    low, high = start * scale, min(source, (start + min(size, resized)) * scale)
    reach = math.ceil(3 * max(1.0, scale)) + 1  # Lanczos reads three pixels in each direction
    return max(0, math.floor(low) - reach), low, high, min(source, math.ceil(high) + reach)
