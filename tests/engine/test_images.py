"""From bytes to pixels: equal to timm's evaluation transform, and firm with what is no picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from timm.data import create_transform

from server.engine.images import decode as decoder
from server.engine.images.decode import Geometry, decode, fit, pixels
from server.engine.images.sniff import check_size
from server.errors import ServiceError
from server.settings import Settings

MAX = 4_000_000


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, height // 7), max(2, width // 7), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def outcome(data: bytes) -> np.ndarray | ServiceError:
    try:
        return np.asarray(decode(data, max_pixels=MAX))
    except ServiceError as error:
        return error


def refused(data: bytes, **options: int) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        decode(data, **{"max_pixels": MAX, **options})
    return caught.value


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.sampled_from([32, 96, 224]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_fit_is_timms_evaluation_transform_to_the_last_bit(
    *, width: int, height: int, size: int, interpolation: str, crop_pct: float, crop_mode: str
) -> None:
    if max(width, height) > 20 * min(width, height):
        width = height = min(width, height) + 20
    mean = (0.485, 0.456, 0.406)
    transform = create_transform(
        (3, size, size), interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, mean=mean, normalize=False
    )
    image = picture(width, height)
    theirs = transform(image).permute(1, 2, 0).numpy()
    ours = fit(image, Geometry.of(size, interpolation, crop_pct, crop_mode, mean))
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_accepted_format(kind: str) -> None:
    image = picture(90, 60)
    result = decode(encoded(image, kind), max_pixels=MAX)
    assert result.mode == "RGB"
    assert result.size == (90, 60)
    assert np.abs(np.asarray(result).astype(int) - np.asarray(image)).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = picture(80, 50)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = decode(encoded(stored, "PNG", exif=exif.tobytes()), max_pixels=MAX)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(ImageOps.exif_transpose(upright)))


def test_broken_exif_is_no_reason_to_refuse() -> None:
    data = encoded(picture(80, 50), "JPEG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff")
    assert decode(data, max_pixels=MAX).size == (80, 50)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(encoded(picture(40, 30, mode), kind), max_pixels=MAX).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    result = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG"), max_pixels=MAX))
    np.testing.assert_array_equal(result[..., 0], ramp >> 8)


def test_transparency_lies_on_white() -> None:
    glass = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(glass, "PNG"), max_pixels=MAX).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    data = encoded(palette, "PNG", transparency=1)
    assert decode(data, max_pixels=MAX).getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(data, max_pixels=MAX).getpixel((0, 0)) == (255, 0, 0)


def test_zero_bytes() -> None:
    error = refused(b"")
    assert (error.status, error.code) == (400, "bad_image")
    assert "0 bytes" in error.detail


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "a GIF"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "a TIFF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC"),
        (b"\0\0\0\x18ftypavif\0\0", "an AVIF"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04rest", "a ZIP"),
        (b'  {"images": []}', "JSON"),
        (b"x", "1 bytes"),
        (b"hello, I am a cat", "17 bytes"),
    ],
)
def test_what_is_no_accepted_picture_is_named(data: bytes, name: str) -> None:
    error = refused(data)
    assert (error.status, error.code) == (415, "unsupported_image")
    assert name in error.detail
    assert "JPEG, PNG, WEBP, BMP" in error.detail


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(65535, 65535), (40_000, 1000), (3000, 3000)])
def test_bombs_are_refused_before_a_pixel_is_decoded(width: int, height: int) -> None:
    error = refused(png(width, height, zlib.compress(bytes(10_000_000))))
    assert (error.status, error.code) == (413, "image_too_large")
    assert f"{width}×{height}" in error.detail


def test_a_phones_photograph_is_small_enough_by_default_and_the_setting_is_named() -> None:
    """12, 48, 50, 64 and 108 megapixels, the largest in the bytes that it takes at a high quality; 200 are refused."""
    limits = Settings()
    for width, height in ((4032, 3024), (8064, 6048), (8160, 6144), (9248, 6936), (12_000, 9000), (16_382, 3628)):
        check_size(width, height, limits.max_image_pixels)
    assert limits.max_body_bytes > 12_000 * 9000 * 0.4
    with pytest.raises(ServiceError, match=r"at most 120000000 are accepted \(LENSRACK_MAX_IMAGE_PIXELS\)"):
        check_size(16_320, 12_240, limits.max_image_pixels)


def test_a_strip_too_long_to_resize_whole_is_fitted_by_its_middle() -> None:
    strip = Image.new("RGB", (1, 30_000), "red")
    strip.paste("blue", (0, 15_000, 1, 30_000))
    result = pixels(encoded(strip, "PNG"), Geometry(224, "bicubic", 0.875, "center"), max_pixels=MAX)
    assert result.shape == (224, 224, 3)
    assert (result[0] == result[0, 0]).all()
    assert (
        np.abs(result[0, 0].astype(int) - (255, 0, 0)).max() <= 10
    )  # 224 rows show less than one pixel of each colour
    assert np.abs(result[-1, 0].astype(int) - (0, 0, 255)).max() <= 10


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.sampled_from([16, 64, 224]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    crop_pct=st.sampled_from([0.5, 0.9, 1.0]),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
)
def test_the_middle_alone_is_the_middle_of_the_whole(
    *, width: int, height: int, size: int, interpolation: str, crop_pct: float, crop_mode: str
) -> None:
    image, geometry = picture(width, height), Geometry(size, interpolation, crop_pct, crop_mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_MAX_WHOLE", 2**40)
        whole = fit(image, geometry).astype(int)
        patch.setattr(decoder, "_MAX_WHOLE", 0)
        middle = fit(image, geometry).astype(int)
    off = np.abs(whole - middle)
    if interpolation == "nearest":  # a tie may fall to the neighbour: a row of sixteen, or two
        assert (off > 0).mean() < 0.2
    else:  # by at most 6 in 4,000 random cases, where Lanczos overshoots; a wrong place would be off by a hundred
        assert off.max() <= 12
        assert off.mean() < 1


def test_a_picture_with_too_much_compressed_data_decodes_to_its_own_size_only() -> None:
    bomb = png(100, 100, zlib.compress(bytes(50_000_000)))
    np.testing.assert_array_equal(outcome(bomb), np.zeros((100, 100, 3)))


def test_a_thousand_scans_are_refused() -> None:
    data = encoded(picture(64, 64), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    error = refused(data[:start] + data[start:-2] * 1000 + data[-2:])
    assert error.code == "bad_image"
    assert "scans" in error.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncation_anywhere_is_an_error_never_half_a_picture(kind: str) -> None:
    data = encoded(picture(64, 48), kind, **({"lossless": True} if kind == "WEBP" else {}))
    whole = np.asarray(decode(data, max_pixels=MAX))
    for cut in range(1, len(data), max(1, len(data) // 60)):
        error = outcome(data[:cut])
        assert isinstance(error, ServiceError), f"{cut} of {len(data)} bytes became a picture"
        assert error.code == "bad_image"
        assert "truncated" in error.detail
    assert outcome(data + b"appended").tolist() == whole.tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_files_decode_or_are_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]))
    raw = bytearray(encoded(picture(48, 32), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    result = outcome(bytes(raw))
    if isinstance(result, ServiceError):
        assert result.status in {400, 413, 415}
    else:
        assert result.shape[2] == 3
