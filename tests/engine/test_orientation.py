"""Whatever Pillow's `exif_transpose` turns is turned by server and SDK: every type, format and byte order."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from lensrack import _resizing
from server.engine.images.decode import decode

# uneven in every way, so that each of the eight orientations gives other pixels; blocks, so that JPEG keeps them apart
PICTURE = Image.fromarray(np.kron(np.arange(0, 240, 40).reshape(2, 3), np.ones((8, 8))).astype(np.uint8)).convert("RGB")
TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 6: "b", 7: "B", 8: "h", 9: "i", 10: "i", 11: "f", 12: "d", 13: "I"}
TYPES |= {16: "Q", 17: "q", 0: "H"}  # the last two are none of Pillow's


def block(order: str, kind: int, value: int, count: int = 1, magic: bytes = b"") -> bytes:
    """An EXIF block with an orientation of a TIFF type, between two other tags."""
    one = struct.pack(order + TYPES[kind], value * 7 if kind in (5, 10) else value)
    raw = (one + (struct.pack(order + "I", 7) if kind in (5, 10) else b"")) * count
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 8)
    entries += struct.pack(order + "HHI", 0x0112, kind, count)
    entries += raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "I", 50)
    entries += struct.pack(order + "HHII", 0x0213, 4, 1, 1)
    magic = magic or {"<": b"II*\0", ">": b"MM\0*"}[order]
    return magic + struct.pack(order + "IH", 8, 3) + entries + bytes(4) + (raw if len(raw) > 4 else b"")


def blocks() -> Iterator[bytes]:
    for order in "<>":
        for value in range(10):
            yield from (block(order, kind, value) for kind in TYPES)
        yield from (block(order, kind, 6, count=2) for kind in TYPES)
    yield from (block("<", 3, 6, magic=b"II\0*"), block(">", 3, 6, magic=b"MM*\0"), b"Exif\0\0" + block(">", 4, 8))


def xmp(value: int, form: str = '<x tiff:Orientation="%d"/>') -> bytes:
    return b'<?xpacket begin=""?>' + (form % value).encode()


def file(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def with_texts(**texts: bytes) -> bytes:
    """A PNG with chunks before its end, by kind."""
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind.encode() + body + struct.pack(">I", zlib.crc32(kind.encode() + body))
        for kind, body in texts.items()
    )
    png = file("PNG")
    return png[:-12] + chunks + png[-12:]


def files() -> Iterator[tuple[str, bytes]]:
    for kind in ("JPEG", "PNG", "WEBP"):
        for number, exif in enumerate(blocks()):
            yield f"{kind} {number}", file(kind, exif=exif if kind != "JPEG" else b"Exif\0\0" + exif)
        without = block("<", 17, 6)  # an EXIF without a tag that can be read: XMP counts
        for value in range(10):
            name = f"{kind} XMP {value}"
            if kind == "PNG":
                texts = PngImagePlugin.PngInfo()
                texts.add_itxt("XML:com.adobe.xmp", xmp(value).decode(), zip=value > 4)
                yield name, file(kind, pnginfo=texts)
            else:
                exif = {"exif": (b"Exif\0\0" if kind == "JPEG" else b"") + without} if value % 2 else {}
                yield name, file(kind, xmp=xmp(value, "<tiff:Orientation>%d</tiff:Orientation>"), **exif)
        yield f"{kind} both", file(kind, xmp=xmp(3), exif=b"Exif\0\0" + block(">", 4, 6))
    exif = block("<", 4, 6)
    profile = b"\nexif\n%8d\n" % len(exif) + b"\n".join(exif.hex().encode()[at : at + 72] for at in range(0, 999, 72))
    yield "raw profile", with_texts(zTXt=b"Raw profile type exif\0\0" + zlib.compress(profile))
    yield "raw profile, plain", with_texts(tEXt=b"Raw profile type exif\0" + profile)
    yield "after the pixels", with_texts(eXIf=exif)
    long = b"Exif\0\0" + block("<", 5, 6)
    yield "in two segments", b"\xff\xd8" + b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in (long[6:40], long[40:])
    ) + file("JPEG")[2:]  # fmt: skip


def test_what_pillow_turns_is_turned_by_server_and_sdk() -> None:
    turned = 0
    for name, data in files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags with more values than one
            theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            ours = decode(data, max_pixels=10**6)
            cut = _resizing._from_file(data)
        assert np.array_equal(ours, theirs.convert("RGB")), name
        assert cut is None or np.array_equal(cut.convert("RGB"), ours), name
        turned += not np.array_equal(ours, Image.open(io.BytesIO(data)).convert("RGB"))
    assert turned > 450


@pytest.mark.parametrize(
    "data",
    [
        with_texts(zTXt=b"Raw profile type exif\0\0" + zlib.compress(b"\n" * 3 + b"4d" * 2**23)),
        with_texts(zTXt=b"Raw profile type exif\0\0no zlib"),
        with_texts(tEXt=b"Raw profile type exif\0\n\n\nno hexadecimal"),
        with_texts(iTXt=b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 2**24 + xmp(6))),
        file("JPEG", exif=b"Exif\0\0" + block("<", 4, 6, count=2**28)[:50]),
        file("WEBP", exif=b"II*\0\xff\xff\xff\xff"),
    ],
)
def test_metadata_that_is_broken_or_a_bomb_is_ignored(data: bytes) -> None:
    plain = decode(file({b"\xff": "JPEG", b"R": "WEBP"}.get(data[:1], "PNG")), max_pixels=10**6)
    assert np.array_equal(decode(data, max_pixels=10**6), plain)
