"""Whatever a caller holds as an image arrives with the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lensrack import InvalidInput, wire
from lensrack._images import encode, sniff
from lensrack._resizing import encode as resized
from server.engine.images.decode import decode

RNG = np.random.default_rng(7)
GEOMETRY = wire.Geometry(size=32, interpolation="bicubic", crop_pct=1, crop_mode="center")


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 4), (1, 1, 3), (5, 7), (300, 200, 3)])
def test_an_array_travels_without_loss(shape: tuple[int, ...]) -> None:
    array = pixels(*shape)
    data, kind = encode(array)
    assert kind == "image/png"
    assert np.array_equal(decoded(data), array)


def test_one_channel_is_grey() -> None:
    array = pixels(4, 6, 1)
    assert np.array_equal(decoded(encode(array)[0]), array[:, :, 0])


def test_a_view_travels_as_it_is_seen() -> None:
    array = pixels(8, 8, 3)[::2, ::-1]
    assert np.array_equal(decoded(encode(array)[0]), array)


@pytest.mark.parametrize(
    ("array", "how"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]: .* \(array \* 255\).round\(\)"),
        (np.zeros((4, 4, 3), np.int64), "scale it to 0..255, then array.astype"),
        (np.zeros((4, 4, 3), ">u2"), r"\(array >> 8\).astype\('uint8'\)"),
        (np.zeros((4, 4), np.bool_), r"array.astype\('uint8'\) \* 255"),
        (pixels(3, 8, 9), r"array.transpose\(1, 2, 0\)"),
        (pixels(5, 4, 4, 3), "a list of arrays"),
        (pixels(4), r"uint8 \[4\]$"),
        (pixels(4, 4, 2), r"uint8 \[4, 4, 2\]$"),
        (pixels(0, 4, 3), r"uint8 \[0, 4, 3\]$"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype}{list(value.shape)}",
)
def test_other_arrays_are_refused_with_what_to_do(array: np.ndarray, how: str) -> None:
    with pytest.raises(InvalidInput, match=rf"must be uint8 \[H, W, 3\], not .*{how}"):
        encode(array)


def seen(image: Any) -> np.ndarray:
    """The pixels that the server makes of what is sent for an image."""
    return np.asarray(decode(encode(image)[0], max_pixels=10**6))


EIGHT_BITS = ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_a_pillow_image_of_eight_bits_is_what_pillow_shows(mode: str) -> None:
    image = Image.fromarray(pixels(6, 4, 3)).convert(mode)
    assert np.array_equal(seen(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "plain"), [("PA", "RGBA"), ("RGBa", "RGBA"), ("La", "LA")])
def test_transparency_is_laid_on_white_by_the_server(mode: str, plain: str) -> None:
    image = Image.fromarray(pixels(6, 4, 4)).convert("LA" if mode in ("PA", "La") else "RGBA").convert(mode)
    assert np.array_equal(seen(image), seen(image.convert(plain)))
    assert (seen(Image.new(plain, (2, 2)).convert(mode)) == 255).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_sixteen_bits_keep_their_high_byte(mode: str) -> None:
    """As in a 16-bit file; Pillow's own conversion to 8 bits makes them white."""
    samples = RNG.integers(0, 65536, (6, 4), dtype=np.uint16)
    order = {"I;16B": ">u2", "I": "=i4", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (4, 6), samples.astype(order).tobytes())
    assert np.array_equal(seen(image)[:, :, 0], samples >> 8)


@pytest.mark.parametrize(
    ("image", "how"),
    [
        (Image.new("F", (4, 4), 0.5), r"mode F has no defined range: .*convert\('L'\)"),
        (Image.new("I", (4, 4), 70000), r"the values of this one are 70000 to 70000: .*convert\('I;16'\)"),
        (Image.new("I", (4, 4), -1), "are -1 to -1"),
        (Image.new("I", (4, 4), 255), r"values up to 255 by image.convert\('L'\)"),
    ],
    ids=["F", "32 bits", "signed", "8 or 16 bits"],
)
def test_pillow_images_without_a_range_are_refused(image: Any, how: str) -> None:
    for geometry in (None, GEOMETRY):
        with pytest.raises(InvalidInput, match=how):
            encode(image) if geometry is None else resized(image, geometry)


class Rotten:
    """A picture that raises whatever it is told to."""

    mode = "RGB"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def getexif(self) -> Any:
        raise self.error

    load = save = convert = getexif


def truncated() -> Any:
    buffer = io.BytesIO()
    Image.fromarray(pixels(40, 40, 3)).save(buffer, "JPEG")
    return Image.open(io.BytesIO(buffer.getvalue()[:-300]))  # Pillow reads its pixels later


def closed() -> Any:
    file = io.BytesIO(b"picture")
    file.close()
    return file


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (truncated(), "truncated"),
        (closed(), "closed file"),
        (Rotten(Image.DecompressionBombError("a bomb")), "a bomb"),
        (Rotten(MemoryError()), "MemoryError"),
        ("nul\0.png", "null byte"),
    ],
)
def test_whatever_a_picture_raises_is_about_the_picture(image: Any, why: str) -> None:
    for geometry in (None, GEOMETRY):
        with pytest.raises(InvalidInput, match=why):
            encode(image) if geometry is None else resized(image, geometry)


def test_nothing_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    read = io.BytesIO(b"\xff\xd8\xff")
    read.read()
    for source, what in ((tmp_path / "empty.jpg", r"empty\.jpg is"), (b"", "image is"), (read, r".*seek\(0\)")):
        with pytest.raises(InvalidInput, match=what) as caught:
            encode(source)
        assert "empty (0 bytes)" in str(caught.value)


def test_a_pillow_image_travels_upright() -> None:
    """The file's bytes would be turned by their EXIF orientation on the server; the opened image must be, too."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (8, 2)).save(buffer, "JPEG", exif=exif)
    data, _ = encode(Image.open(io.BytesIO(buffer.getvalue())))
    upright = Image.open(io.BytesIO(data))
    assert upright.size == (2, 8)
    assert upright.getexif().get(0x0112, 1) == 1


def test_files_travel_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.png"
    Image.fromarray(pixels(4, 4, 3)).save(path, "JPEG")
    data = path.read_bytes()
    sources: list[Any] = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)]
    with path.open("rb") as file:
        assert [encode(source) for source in [*sources, file]] == [(data, "image/jpeg")] * 7


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif", "tiff"])
def test_types_are_told_from_bytes(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(4, 4, 3)).save(buffer, kind)
    assert sniff(buffer.getvalue()) == f"image/{kind}"


def test_unknown_bytes_are_for_the_server_to_judge() -> None:
    assert sniff(b"") == sniff(b"hello") == "application/octet-stream"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (7, "an image is a path, bytes, .* not int"),
        (None, "not NoneType"),
        ("missing.jpg", r"cannot read the image missing\.jpg: No such file"),
        (io.StringIO("text"), "must be opened in binary mode"),
    ],
)
def test_what_is_no_image(source: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        encode(source)
