"""Whatever a caller holds as an image arrives with the same pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lensrack import InvalidInput
from lensrack._images import encode, sniff

RNG = np.random.default_rng(7)


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
    "array",
    [np.zeros((4, 4, 3), np.float32), pixels(3, 4, 4, 4), pixels(4), pixels(4, 4, 2), pixels(0, 4, 3)],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match=r"expected|must be uint8 \[H, W, 3\], not (uint8|float32) \["):
        encode(array)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "I;16"])
def test_pillow_images_travel(mode: str) -> None:
    image = Image.fromarray(pixels(6, 4, 3)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    data, kind = encode(image)
    assert kind == "image/png"
    assert Image.open(io.BytesIO(data)).size == (4, 6)


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
