"""Hostile and broken images, made here, each with the answer it must get.

What `decode` may do with any bytes at all: give the whole picture, or raise a ServiceError. Never half a picture,
another exception, a warning, a process-wide side effect, or memory beyond the picture's own.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from server.engine.images.decode import Geometry, decode, pixels
from server.errors import BadRequest, ServiceError, TooLarge, UnsupportedMedia

MAX = 1_000_000
ROOT = Path(__file__).parents[2]


# --- making files -----------------------------------------------------------------------------------------------------


def photo(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    """Smooth colours that nowhere come near the grey of a decoder that ran out of data."""
    y, x = np.mgrid[0:height, 0:width]
    red = 200 + 50 * np.sin(x / 9)
    green, blue = 30 + 25 * np.cos(y / 7), 20 + 0 * x
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def after_soi(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def bmp(width: int, height: int, bits: int, compression: int, body: bytes) -> bytes:
    """A BMP with a BITMAPV3INFOHEADER: 32-bit ones say that they have alpha."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 56, width, height, 1, bits, compression, len(body), 0, 0, 0, 0) + masks
    return struct.pack("<2sIHHI", b"BM", 70 + len(body), 0, 0, 70) + header + body


def webp(kind: bytes, payload: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(body)) + body


JPEG, PROGRESSIVE = encoded(photo(), "JPEG"), encoded(photo(), "JPEG", progressive=True)
PNG, WEBP, BMP = encoded(photo(), "PNG"), encoded(photo(), "WEBP"), encoded(photo(), "BMP")
FILES = {"jpeg": JPEG, "progressive": PROGRESSIVE, "png": PNG, "webp": WEBP, "bmp": BMP}
SOF = JPEG.index(b"\xff\xc0")
SCANS = PROGRESSIVE.index(b"\xff\xda")


def jpeg_of_size(width: int, height: int) -> bytes:
    return JPEG[: SOF + 5] + struct.pack(">HH", height, width) + JPEG[SOF + 9 :]


# --- refused ----------------------------------------------------------------------------------------------------------

BAD, OTHER, LARGE = (400, "bad_image"), (415, "unsupported_image"), (413, "image_too_large")
REFUSED: dict[str, tuple[bytes, tuple[int, str], str]] = {
    # nothing, or nothing much
    "0 bytes": (b"", BAD, "0 bytes"),
    "1 byte": (b"\x00", OTHER, "1 bytes"),
    "first byte of a JPEG": (JPEG[:1], BAD, "truncated"),
    "magic alone": (JPEG[:3], BAD, "truncated"),
    # other formats
    "GIF": (encoded(photo(), "GIF"), OTHER, "a GIF"),
    "animated GIF": (encoded(photo(), "GIF", save_all=True, append_images=[photo(mode="L")]), OTHER, "a GIF"),
    "float TIFF": (encoded(Image.new("F", (4, 4)), "TIFF"), OTHER, "a TIFF"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', OTHER, "an SVG"),
    "SVG with entities": (b'<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>', OTHER, "an SVG"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", OTHER, "a HEIC"),
    "AVIF": (encoded(photo(), "AVIF"), OTHER, "an AVIF"),
    "PDF": (encoded(photo(), "PDF"), OTHER, "a PDF"),
    "ZIP": (b"PK\x03\x04" + bytes(30), OTHER, "a ZIP"),
    "ICO": (encoded(photo(), "ICO"), OTHER, "an ICO"),
    "JPEG 2000": (encoded(photo(), "JPEG2000"), OTHER, "a JPEG 2000"),
    "HTML": (b"<!DOCTYPE html><html>Not found</html>", OTHER, "an HTML page"),
    "base64": (b"data:image/png;base64,iVBORw0KGgo=", OTHER, "text"),
    "text that begins as a BMP": (b"BMW is not a bitmap at all", OTHER, "text"),
    "WAV": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(20), OTHER, "no known format"),
    "EPS, which Pillow hands to Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", OTHER, "text"),
    # sizes
    "PNG of 65535²": (png(65535, 65535, 8, 2, b""), LARGE, "65535×65535"),
    "PNG of 2³¹-1": (png(2**31 - 1, 1, 8, 2, b""), LARGE, "2147483647×1"),
    "JPEG of 65500²": (jpeg_of_size(65500, 65500), LARGE, "65500×65500"),
    "BMP of 60000²": (bmp(60_000, 60_000, 24, 0, b""), LARGE, "60000×60000"),
    "BMP of negative width": (bmp(-5, 5, 24, 0, bytes(99)), LARGE, "4294967291×5"),
    "WebP canvas of 16384²": (webp(b"VP8X", b"\0\0\0\0" + b"\xff\x3f\0" * 2), LARGE, "16384×16384"),
    "WebP VP8L of 16384²": (webp(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(9)), LARGE, "16384×16384"),
    "WebP VP8 of 16383²": (webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(9)), LARGE, "16383×16383"),
    "1×100000": (encoded(Image.new("1", (1, 100_000)), "PNG"), LARGE, "at most 32768 a side"),
    "a pixel too many": (encoded(Image.new("1", (1000, 1001)), "PNG"), LARGE, f"at most {MAX} are accepted"),
    "PNG of 0×5": (png(0, 5, 8, 2, b""), BAD, "0×5"),
    "JPEG of height 0 (DNL)": (jpeg_of_size(96, 0), BAD, "96×0"),
    "BMP of 0×0": (bmp(0, 0, 24, 0, b""), BAD, "damaged"),
    # JPEG
    "JPEG without its end": (JPEG[:-2], BAD, "truncated"),
    "JPEG without scans": (JPEG[: JPEG.index(b"\xff\xda")] + b"\xff\xd9", BAD, "no picture"),
    "JPEG of two frames": (JPEG[:SOF] + segment(0xC0, JPEG[SOF + 4 : SOF + 19]) + JPEG[SOF:], BAD, "several"),
    "JPEG of 12 bits": (JPEG[: SOF + 4] + b"\x0c" + JPEG[SOF + 5 :], OTHER, "this has 12"),
    "JPEG of two components": (JPEG[: SOF + 9] + b"\x02" + JPEG[SOF + 10 :], BAD, "damaged"),
    "JPEG with a segment of 1 byte": (after_soi(JPEG, b"\xff\xe1\x00\x01"), BAD, "a segment says"),
    "JPEG of 1,000 scans": (PROGRESSIVE[:SCANS] + PROGRESSIVE[SCANS:-2] * 200 + b"\xff\xd9", BAD, "scans"),
    "JPEG of 100,000 segments": (after_soi(JPEG, *[b"\xff\xfe\0\2"] * 100_000), BAD, "more than 65536 segments"),
    # PNG
    "PNG without IDAT": (PNG[:33] + chunk(b"IEND", b""), BAD, "no picture"),
    "PNG without IEND": (PNG[:-12], BAD, "truncated"),
    "PNG with too little data": (png(9, 9, 8, 2, bytes(20)), BAD, "truncated"),
    "PNG with a flipped bit": (PNG[:60] + bytes([PNG[60] ^ 4]) + PNG[61:], BAD, "checksum"),
    "PNG whose data is no zlib": (PNG[:33] + chunk(b"IDAT", b"\0" * 99) + PNG[-12:], BAD, "damaged"),
    "PNG of an unknown colour type": (png(4, 4, 8, 5, bytes(99)), BAD, "damaged"),
    "PNG by Apple": (PNG[:8] + chunk(b"CgBI", b"\x50\0\x20\2") + PNG[8:], BAD, "not in its place"),
    "PNG with two headers": (PNG[:33] + PNG[8:], BAD, "not in its place"),
    "PNG with a short header": (PNG[:8] + chunk(b"IHDR", bytes(12)) + PNG[33:], BAD, "expected 13"),
    "PNG of 100,000 chunks": (PNG[:33] + chunk(b"IDAT", b"") * 100_000 + PNG[33:], BAD, "more than 65536 chunks"),
    "PNG that promises 4 GiB": (PNG[:33] + b"\xff\xff\xff\xffIDAT" + PNG[41:], BAD, "truncated"),
    # WebP and BMP
    "WebP cut": (WEBP[:-9], BAD, "truncated"),
    "WebP with an empty body": (webp(b"VP8X", b"\0\0\0\0" + b"\x0f\0\0" * 2 + bytes(9)), BAD, "damaged"),
    "WebP of an unknown kind": (webp(b"ABCD", bytes(40)), BAD, "not a picture"),
    "BMP cut": (BMP[:-9], BAD, "truncated"),
    "BMP of 7 bits": (bmp(4, 4, 7, 0, bytes(99)), BAD, "damaged"),
    "BMP with a JPEG inside": (bmp(96, 64, 24, 4, JPEG), BAD, "damaged"),
    "BMP of run lengths": (bmp(30_000, 30, 8, 1, bytes(1024) + b"\0\0" * 30), OTHER, "run-length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name: str) -> None:
    data, expected, words = REFUSED[name]
    with pytest.raises(ServiceError) as caught:
        decode(data, max_pixels=MAX)
    assert (caught.value.status, caught.value.code) == expected
    assert words in caught.value.detail


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_nothing_of_the_inside(name: str) -> None:
    with pytest.raises(ServiceError) as caught:
        decode(REFUSED[name][0], max_pixels=MAX)
    assert not re.search(r"PIL|Pillow|lib(jpeg|png|webp)|Error|BytesIO|0x|/|\\|<", caught.value.detail)
    assert len(caught.value.detail) < 200


def test_a_size_refused_is_told_in_numbers_too() -> None:
    with pytest.raises(ServiceError) as caught:
        decode(jpeg_of_size(2000, 1500), max_pixels=MAX)
    assert caught.value.extra == {"width": 2000, "height": 1500, "max_pixels": MAX, "max_side": 32768}


# --- accepted ---------------------------------------------------------------------------------------------------------

RED, GREY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)
_RED_RGB, _TRNS_RED = b"\0" + b"\xff\0\0" * 2, struct.pack(">3H", 255, 0, 0)
_ADOBE = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
ACCEPTED: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "grey": (png(2, 1, 8, 0, b"\0\x80\x80"), GREY),
    "1 bit": (png(2, 1, 1, 0, b"\0\xc0"), WHITE),
    "1 bit, white transparent": (png(2, 1, 1, 0, b"\0\x00", chunk(b"tRNS", b"\0\0")), WHITE),
    "2 bits, transparent": (png(2, 1, 2, 0, b"\0\x50", chunk(b"tRNS", b"\0\1")), WHITE),
    "2 bits, another transparent": (png(2, 1, 2, 0, b"\0\xa0", chunk(b"tRNS", b"\0\1")), (170, 170, 170)),
    "4 bits, transparent": (png(2, 1, 4, 0, b"\0\x33", chunk(b"tRNS", b"\0\3")), WHITE),
    "16 bits": (png(2, 1, 16, 0, b"\0\x80\xff\x80\xff"), GREY),
    "16 bits, transparent": (png(2, 1, 16, 0, b"\0\x80\xff\x80\xff", chunk(b"tRNS", b"\x80\xff")), WHITE),
    "16 bits, another transparent": (png(2, 1, 16, 0, b"\0\x80\xff\x80\xff", chunk(b"tRNS", b"\x80\0")), GREY),
    "16-bit colour": (png(2, 1, 16, 2, b"\0" + b"\xff\xff\0\0\0\0" * 2), RED),
    "16-bit colour, transparent": (
        png(2, 1, 16, 2, b"\0" + b"\xff\xff\0\0\0\0" * 2, chunk(b"tRNS", b"\xff\xff\0\0\0\0")),
        WHITE,
    ),
    "16-bit grey and alpha": (png(2, 1, 16, 4, b"\0" + b"\x80\0\xff\xff" * 2), GREY),
    "colour": (png(2, 1, 8, 2, _RED_RGB), RED),
    "colour, transparent": (png(2, 1, 8, 2, _RED_RGB, chunk(b"tRNS", _TRNS_RED)), WHITE),
    "palette": (png(2, 1, 8, 3, b"\0\1\1", chunk(b"PLTE", b"\0\0\0\xff\0\0")), RED),
    "palette, an entry transparent": (
        png(2, 1, 8, 3, b"\0\1\1", chunk(b"PLTE", b"\0\0\0\xff\0\0"), chunk(b"tRNS", b"\xff\0")),
        WHITE,
    ),
    "palette, an entry translucent": (
        png(2, 1, 8, 3, b"\0\1\1", chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\x09\x7f")),
        GREY,
    ),
    "grey and alpha": (png(2, 1, 8, 4, b"\0\0\x7f\0\x7f"), GREY),
    "colour and alpha": (png(2, 1, 8, 6, b"\0" + b"\xff\0\0\xff" * 2), RED),
    "colour and no alpha at all": (png(2, 1, 8, 6, b"\0" + b"\xff\0\0\0" * 2), WHITE),
    "CMYK": (_ADOBE, RED),
    "BMP whose alpha nobody wrote": (bmp(2, 1, 32, 3, b"\0\0\xff\0" * 2), RED),
    "BMP with alpha": (bmp(2, 1, 32, 3, b"\0\0\xff\0\0\0\xff\xff"), WHITE),
    "WebP with alpha": (encoded(Image.new("RGBA", (2, 1), (9, 9, 9, 0)), "WEBP", lossless=True, exact=True), WHITE),
    "ICC that is garbage": (png(2, 1, 8, 2, _RED_RGB, chunk(b"iCCP", b"x\0\0garbage")), RED),
    "ICC that is a bomb": (
        png(2, 1, 8, 2, _RED_RGB, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000)))),
        RED,
    ),
    "text that is a bomb": (
        png(2, 1, 8, 2, _RED_RGB, *[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000)))] * 9),
        RED,
    ),
    "animation header that lies": (png(2, 1, 8, 2, _RED_RGB, chunk(b"acTL", bytes(8)), chunk(b"acTL", b"")), RED),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_its_colour(name: str) -> None:
    data, colour = ACCEPTED[name]
    found = decode(data, max_pixels=MAX)
    assert found.mode == "RGB"
    assert found.getpixel((0, 0)) == pytest.approx(colour, abs=1)


def whole(data: bytes) -> list[list[list[int]]]:
    return np.asarray(decode(data, max_pixels=MAX)).tolist()


_HALF = JPEG[: JPEG.index(b"\xff\xda")]
DECORATED: dict[str, bytes] = {
    "ICC of 10 MB in pieces": after_soi(
        JPEG, *[segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 160]) + bytes(65_000)) for i in range(160)]
    ),
    "EXIF that is garbage": after_soi(JPEG, segment(0xE1, b"Exif\0\0" + b"\xff" * 50)),
    "EXIF that points outside": after_soi(JPEG, segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xf0")),
    "EXIF that points at itself": after_soi(JPEG, segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30))),
    "EXIF that is cut": after_soi(JPEG, segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0")),
    "EXIF that turns by 77": after_soi(
        JPEG, segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\x4d\0\0")
    ),
    "a multi-picture header that lies": after_soi(JPEG, segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0")),
    "a thumbnail that ends": after_soi(JPEG, segment(0xE1, b"Exif\0\0" + JPEG[:9000]), segment(0xFE, b"\xff\xd9")),
    "a picture inside a comment": after_soi(JPEG, segment(0xFE, jpeg_of_size(9, 9)[:900])),
    "fill bytes": _HALF + b"\xff" * 100_000 + JPEG[len(_HALF) :],
    "a ZIP appended": JPEG + b"PK\x03\x04" + bytes(500) + b"PK\x05\x06" + bytes(18),
    "another picture appended": JPEG + jpeg_of_size(65500, 65500),
}


@pytest.mark.parametrize("name", DECORATED)
def test_what_decides_no_pixel_changes_none(name: str) -> None:
    assert whole(DECORATED[name]) == whole(JPEG)


def test_adobes_ycck_is_told_from_cmyk() -> None:
    adobe = _ADOBE.index(b"Adobe")
    ycck = _ADOBE[: adobe + 11] + b"\2" + _ADOBE[adobe + 12 :]
    with Image.open(io.BytesIO(ycck)) as reference:
        assert whole(ycck) == np.asarray(reference.convert("RGB")).tolist()
    assert whole(ycck) != whole(_ADOBE)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_shows_one_whole_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert whole(data) == [[[255, 0, 0]] * 8] * 8


# --- truncation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png", "webp", "bmp"])
def test_no_beginning_of_a_file_becomes_a_picture(name: str) -> None:
    data = FILES[name]
    for cut in range(10, len(data), 10):
        with pytest.raises(ServiceError, match="truncated") as caught:
            decode(data[:cut], max_pixels=MAX)
        assert caught.value.code == "bad_image"


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE], ids=["baseline", "progressive"])
def test_a_jpeg_cut_before_in_and_after_each_marker(data: bytes) -> None:
    markers = [match.start() for match in re.finditer(rb"\xff[^\x00\xff]", data)]
    assert len(markers) > 8
    for at in markers:
        for cut in range(max(at, 1), min(at + 5, len(data) - 1)):
            with pytest.raises(ServiceError, match="truncated"):
                decode(data[:cut], max_pixels=MAX)


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def survives(data: bytes) -> None:
    try:
        square = pixels(data, Geometry(16, "bilinear", 0.9, "center"), max_pixels=MAX)
    except (BadRequest, TooLarge, UnsupportedMedia):
        return
    assert square.shape == (16, 16, 3)


MAGICS = [b"", b"\xff\xd8\xff", PNG[:8], PNG[:33], WEBP[:16], b"RIFF\xff\0\0\0WEBPVP8X", BMP[:18], BMP[:54]]


@settings(max_examples=300, deadline=None)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=300))
@example(magic=b"\xff\xd8", rest=b"\xff" * 300)
def test_random_bytes(magic: bytes, rest: bytes) -> None:
    survives(magic + rest)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_mutated_files(name: str, data: st.DataObject) -> None:
    raw = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 200))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    survives(bytes(raw))


@settings(max_examples=200, deadline=None)
@given(
    head=st.binary(min_size=4, max_size=4),
    side=st.integers(0, 40),
    kind=st.sampled_from([b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"]),
    payload=st.binary(max_size=60),
    rows=st.binary(max_size=400),
)
def test_pngs_whose_checksums_are_right(*, head: bytes, side: int, kind: bytes, payload: bytes, rows: bytes) -> None:
    body = png(side, 7, 8, 2, rows, chunk(kind, payload))
    header = body[16:24] + bytes([1 << head[0] % 5, head[1] % 8, 0, 0, head[2] % 2])
    survives(body[:8] + chunk(b"IHDR", header) + body[33:])


# --- the process around it --------------------------------------------------------------------------------------------


def test_threads_share_no_state() -> None:
    files = [*FILES.values(), *DECORATED.values(), *(case[0] for case in REFUSED.values())] * 3
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS

    def answer(data: bytes) -> object:
        try:
            return zlib.crc32(decode(data, max_pixels=MAX).tobytes())
        except ServiceError as error:
            return error.detail

    alone = [answer(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, files)) == alone
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == (filters, limit)


@pytest.mark.parametrize("name", FILES)
def test_our_limit_stands_and_pillows_does_not_warn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 - 1)  # Image.open would warn, which is an error here
    assert decode(FILES[name], max_pixels=96 * 64).size == (96, 64)


CONFINED = """
    import resource, sys
    from pathlib import Path
    from server.engine.images.decode import Geometry, pixels
    from server.errors import ServiceError

    def answer(name):
        try:
            return pixels(Path(sys.argv[1], name).read_bytes(), square, max_pixels=1_000_000).shape
        except ServiceError as error:
            return error.code

    square = Geometry(224, "bicubic", 0.875, "center")
    for name in ("jpeg", "png", "webp", "bmp"):
        answer(name)  # what is allocated once
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 24 * 2**20, size + 24 * 2**20))
    print(answer("bomb"))
"""
_ZEROS = zlib.compress(bytes(400_000_000), 9)
BOMBS: dict[str, tuple[bytes, str]] = {
    "PNG of 65535²": (png(65535, 65535, 8, 2, bytes(9)), "image_too_large"),
    "JPEG of 65500²": (jpeg_of_size(65500, 65500), "image_too_large"),
    "BMP of 60000²": (bmp(60_000, 60_000, 24, 0, b""), "image_too_large"),
    "WebP canvas of 16384²": (REFUSED["WebP canvas of 16384²"][0], "image_too_large"),
    "WebP VP8L of 16384²": (REFUSED["WebP VP8L of 16384²"][0], "image_too_large"),
    "WebP of 4000×4000": (encoded(Image.new("RGB", (4000, 4000)), "WEBP", lossless=True), "image_too_large"),
    "400 MB of zeros for 100×100": (
        PNG[:8]
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", _ZEROS)
        + chunk(b"IEND", b""),
        "(224, 224, 3)",
    ),
    "400 MB of ICC": (png(2, 1, 8, 2, _RED_RGB, chunk(b"iCCP", b"x\0\0" + _ZEROS)), "(224, 224, 3)"),
    "400 MB of text": (png(2, 1, 8, 2, _RED_RGB, chunk(b"zTXt", b"x\0\0" + _ZEROS)), "(224, 224, 3)"),
    "a strip of 1×32768": (encoded(Image.new("L", (1, 32_768)), "PNG"), "(224, 224, 3)"),
    "a strip of 32768×1": (encoded(Image.new("L", (32_768, 1)), "JPEG"), "(224, 224, 3)"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on the address space")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_answered_in_24_mib(name: str, tmp_path: Path) -> None:
    """The limit counts what is reserved and never touched, too."""
    data, expected = BOMBS[name]
    for file, content in (FILES | {"bomb": data}).items():
        (tmp_path / file).write_bytes(content)
    command = [sys.executable, "-c", textwrap.dedent(CONFINED), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == expected, done.stderr
