"""The format of an image file and the position of its parts, parsed by hand before a decoder sees a byte of it.

    bytes ── sniff ──> its format            UnsupportedMedia unsupported_image: not one of FORMATS
          ── strip ──> its pixels' segments  BadRequest bad_image: truncated or damaged, TooLarge image_too_large

`strip` drops everything that does not affect pixels: EXIF and XMP (after reading the orientation from them), ICC
profiles, text, thumbnails, animation, appended data. So hostile metadata never reaches a decoder, which also keeps
Pillow from issuing warnings about it: warnings cannot be silenced for one thread alone.

Sources: ITU-T T.81 annex B (JPEG), W3C PNG third edition, RFC 9649 (WebP).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from server.errors import BadRequest, TooLarge, UnsupportedMedia

from . import orientation

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_SIDE = 32_768
MAX_SEGMENTS = 65_536  # a 32 MB PNG in the usual 8 KB chunks has 4,096
MAX_SCANS = 64  # progressive encoders write about ten; each scan visits every block of the picture

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_SHORTEST = {b"\xff\xd8\xff": 3, _PNG: 8, b"RIFF": 12, b"BM": 18}


@dataclass(frozen=True)
class Stripped:
    """A file reduced to its pixels: `body` is a complete file of the same format, `orientation` EXIF's 1 to 8."""

    body: bytes
    orientation: int = 1


def truncated(image_format: str) -> BadRequest:
    return BadRequest(f"the {image_format} image is truncated: its data ends too early", code="bad_image")


def damaged(image_format: str, why: str) -> BadRequest:
    return BadRequest(f"the {image_format} image is damaged: {why}", code="bad_image")


# --- which format -----------------------------------------------------------------------------------------------------


def sniff(data: bytes) -> str:
    """One of FORMATS. Errors: bad_image for an empty file or an incomplete header, unsupported_image for anything
    else."""
    if not data:
        raise BadRequest("the image has 0 bytes", code="bad_image")
    if data.startswith(_JPEG):
        return "JPEG"
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if any(len(data) < length and data[: len(magic)] == magic[: len(data)] for magic, length in _SHORTEST.items()):
        raise BadRequest(f"the image is truncated: {len(data)} bytes are not even a header", code="bad_image")
    raise UnsupportedMedia(
        f"expected an image in one of the formats {', '.join(FORMATS)}; this looks like {_looks_like(data)}",
        code="unsupported_image",
        accepted=list(FORMATS),
    )


_LOOKS = (
    (b"GIF8", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"II+\0", "a TIFF"),
    (b"MM\0+", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"8BPS", "a PSD"),
    (b"\0\0\x01\0", "an ICO"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
)
_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC"
)
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_WORDS = (
    (re.compile(rb"\s*<(!doctype )?html", re.IGNORECASE), "an HTML page"),
    (re.compile(rb"\s*[{\[]"), "JSON"),
)
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\xff]")


def _looks_like(data: bytes) -> str:
    for magic, name in _LOOKS:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an MP4 or a relative of it")
    head = data[:1024]
    if _SVG.search(head):
        return "an SVG"
    if _BINARY.search(head):
        return f"{len(data)} bytes of no known format"
    return next((name for word, name in _WORDS if word.match(head)), f"{len(data)} bytes of text")


# --- dimensions -------------------------------------------------------------------------------------------------------


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise for a size that is not accepted; from the header alone, before any pixel is decoded."""
    if width < 1 or height < 1:
        raise BadRequest(f"the image is {width}×{height} pixels: both sides must be at least 1", code="bad_image")
    if width > MAX_SIDE or height > MAX_SIDE:
        limit = f"at most {MAX_SIDE} a side are accepted"
    elif width * height > max_pixels:
        limit = f"{width * height} in all, at most {max_pixels} are accepted (LENSRACK_MAX_IMAGE_PIXELS)"
    else:
        return
    raise TooLarge(
        f"the image is {width}×{height} pixels: {limit}",
        code="image_too_large",
        width=width,
        height=height,
        max_pixels=max_pixels,
        max_side=MAX_SIDE,
    )


# --- stripping --------------------------------------------------------------------------------------------------------


def strip(data: bytes, image_format: str, *, max_pixels: int) -> Stripped:
    """Return the file without its metadata, after checking its declared size if the header can be read here."""
    if image_format == "JPEG":
        return _strip_jpeg(data, max_pixels)
    if image_format == "PNG":
        return _strip_png(data, max_pixels)
    if image_format == "WEBP":
        return _strip_webp(data, max_pixels)
    if len(data) < 14 + int.from_bytes(data[14:18], "little"):
        raise truncated("BMP")
    return Stripped(data)  # a BMP has no metadata, and opening one reads its header only


_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn, without DHT, JPG and DAC
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_DROPPED = (frozenset(range(0xE0, 0xF0)) - {0xE0, 0xEE}) | {
    0xFE
}  # APPn and comments, except JFIF and Adobe, which define colours
_NEXT_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # not a stuffed zero, TEM, RSTn or fill byte


def _strip_jpeg(data: bytes, max_pixels: int) -> Stripped:
    kept: list[bytes] = [b"\xff\xd8"]
    exif, xmp, frames, scans = b"", b"", 0, 0
    for marker, payload, segment in _jpeg_segments(data):
        if marker in _FRAMES:
            frames += 1
            _check_frame(payload, frames, max_pixels)
        scans += marker == _SOS
        if marker == _APP1 and payload.startswith(_EXIF):
            exif += payload[len(_EXIF) :]  # a block above 64 KiB goes on in the next segment
        elif marker == _APP1 and payload.startswith(_XMP):
            xmp = payload
        if marker not in _DROPPED:
            kept.append(segment)
    if not frames or not scans:
        raise damaged("JPEG", "it holds no picture")
    if scans > MAX_SCANS:
        raise damaged("JPEG", f"it has {scans} scans, at most {MAX_SCANS} are accepted")
    return Stripped(b"".join([*kept, b"\xff\xd9"]), orientation.read(exif, xmp))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield marker, payload and whole segment, up to the end of the picture; a scan's segment includes its coded
    data."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        start = _next_marker(data, at)
        marker = data[start + 1]
        if marker == _EOI:
            return
        payload = _jpeg_payload(data, start + 2)
        at = start + 4 + len(payload)
        if marker == _SOS:
            at = _next_marker(data, at)
        yield marker, payload, data[start:at]
    raise damaged("JPEG", f"it has more than {MAX_SEGMENTS} segments")


def _next_marker(data: bytes, at: int) -> int:
    match = _NEXT_MARKER.search(data, at)
    if match is None:
        raise truncated("JPEG")
    return match.start()


def _jpeg_payload(data: bytes, start: int) -> bytes:
    length = int.from_bytes(data[start : start + 2], "big")
    if start + max(length, 2) > len(data):
        raise truncated("JPEG")
    if length < 2:
        raise damaged("JPEG", f"a segment says it has {length} bytes")
    return data[start + 2 : start + length]


def _check_frame(payload: bytes, frames: int, max_pixels: int) -> None:
    if frames > 1 or len(payload) < 6:
        raise damaged("JPEG", "its frame header is broken or there are several")
    bits, height, width, _ = struct.unpack_from(">BHHB", payload)
    check_size(width, height, max_pixels)
    if bits != 8:
        raise UnsupportedMedia(f"expected a JPEG with 8 bits a sample, this has {bits}", code="unsupported_image")


_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def _strip_png(data: bytes, max_pixels: int) -> Stripped:
    kept: list[bytes] = [_PNG]
    exif, texts, pixels = b"", dict[bytes, bytes](), False
    for kind, chunk in _png_chunks(data):
        if kind == b"IHDR":
            _check_header(chunk, max_pixels)
        if kind in _PNG_KEPT:
            _check_sum(kind, chunk)
            kept.append(chunk)
        elif kind[:1].isupper():
            raise damaged("PNG", "it has a critical chunk of an unknown kind")
        elif kind == b"eXIf":
            exif = chunk[8:-4]
        elif kind in _PNG_TEXTS:
            texts.update(_png_text(kind, chunk[8:-4]))
        pixels |= kind == b"IDAT"
    if not pixels:
        raise damaged("PNG", "it holds no picture")
    return Stripped(b"".join(kept), orientation.read(exif or _raw_profile(texts), texts.get(b"XML:com.adobe.xmp", b"")))


_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_PROFILE = b"Raw profile type exif"  # ImageMagick's, from before PNG had a chunk for EXIF
_LONGEST_TEXT = 2**20  # bytes, unpacked


def _png_text(kind: bytes, chunk: bytes) -> dict[bytes, bytes]:
    """The text of a chunk by its keyword, if it may say how the picture is turned and can be read."""
    keyword, _, text = chunk.partition(b"\0")
    if keyword not in (_PNG_PROFILE, b"XML:com.adobe.xmp"):
        return {}
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    text = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text
    if packed:
        try:
            text = zlib.decompressobj().decompress(text, _LONGEST_TEXT)
        except zlib.error:
            return {}
    return {keyword: text}


def _raw_profile(texts: Mapping[bytes, bytes]) -> bytes:
    """EXIF in hexadecimal, behind three lines: nothing, the kind, the length."""
    try:
        return bytes.fromhex(b"".join(texts.get(_PNG_PROFILE, b"").split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and whole chunk, from IHDR to IEND."""
    at = len(_PNG)
    for _ in range(MAX_SEGMENTS):
        kind, chunk = _png_chunk(data, at)
        if (kind == b"IHDR") != (at == len(_PNG)):
            raise damaged("PNG", "its header is missing or not in its place")
        yield kind, chunk
        if kind == b"IEND":
            return
        at += len(chunk)
    raise damaged("PNG", f"it has more than {MAX_SEGMENTS} chunks")


def _png_chunk(data: bytes, at: int) -> tuple[bytes, bytes]:
    """Kind and bytes of the chunk at `at`: length, kind, payload, checksum."""
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    kind = data[at + 4 : at + 8]
    if len(kind) == 4 and not kind.isalpha():
        raise damaged("PNG", "a chunk has no proper name")
    if end > len(data):
        raise truncated("PNG")
    return kind, data[at:end]


def _check_header(chunk: bytes, max_pixels: int) -> None:
    if len(chunk) != 12 + 13:
        raise damaged("PNG", f"its header has {len(chunk) - 12} bytes, expected 13")
    width, height = struct.unpack_from(">II", chunk, 8)
    check_size(width, height, max_pixels)


def _check_sum(kind: bytes, chunk: bytes) -> None:
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        raise damaged("PNG", f"the checksum of its {kind.decode()} chunk does not match")


def _strip_webp(data: bytes, max_pixels: int) -> Stripped:
    """Metadata stays, because libwebp does not interpret it; the canvas is allocated on opening, so its size is checked
    here."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data) or len(data) < 30:
        raise truncated("WEBP")
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    else:
        raise damaged("WEBP", "its first chunk is not a picture")
    check_size(width, height, max_pixels)
    chunks = _webp_metadata(data[:end])
    return Stripped(data[:end], orientation.read(chunks.get(b"EXIF", b""), chunks.get(b"XMP ", b"")))


def _webp_metadata(data: bytes) -> dict[bytes, bytes]:
    """The first chunk of EXIF and of XMP."""
    at, found = 12, dict[bytes, bytes]()
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            break
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in (b"EXIF", b"XMP "):
            found.setdefault(kind, data[at + 8 : at + 8 + length])
        at += 8 + length + (length & 1)
    return found
