"""Format and colour mode of a picture's file, read from its header, before decoding makes it RGB.

PNG 11.2.1 (IHDR) · ITU-T T.81 B.2.2 (SOF) · RFC 9649 2.5 to 2.7 (VP8, VP8L, VP8X) · BITMAPINFOHEADER
"""

from __future__ import annotations

import re
from typing import Final

from server.engine.images import sniff

Kind = tuple[str, str]  # format as in jpeg, mode as Pillow calls it

_PNG_MODES: Final = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_JPEG_MODES: Final = {1: "L", 3: "RGB", 4: "CMYK"}
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn, without DHT, JPG and DAC
_MARKER: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # not a stuffed zero, TEM, RSTn or fill byte
_ALPHA_VP8X: Final = 0x10
_ALPHA_VP8L: Final = 1 << 28


def kind(data: bytes) -> Kind:
    """Format and mode of a picture that has been decoded, so its header is known to be complete."""
    name = sniff.sniff(data)
    mode_of = {"JPEG": _jpeg_mode, "PNG": _png_mode, "WEBP": _webp_mode, "BMP": _bmp_mode}[name]
    return name.lower(), mode_of(data)


def _png_mode(data: bytes) -> str:
    bits, colour = data[24], data[25]
    if colour == 0 and bits in (1, 16):
        return "1" if bits == 1 else "I;16"
    return _PNG_MODES[colour]


def _jpeg_mode(data: bytes) -> str:
    at = 2
    while marker := _MARKER.search(data, at):
        at = marker.start()
        if data[at + 1] in _FRAMES:
            return _JPEG_MODES[data[at + 9]]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return ""  # no frame header; cannot happen after decoding


def _webp_mode(data: bytes) -> str:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return "RGBA" if data[20] & _ALPHA_VP8X else "RGB"
    if chunk == b"VP8L":
        return "RGBA" if int.from_bytes(data[21:25], "little") & _ALPHA_VP8L else "RGB"
    return "RGB"


def _bmp_mode(data: bytes) -> str:
    old = int.from_bytes(data[14:18], "little") == 12
    bits = int.from_bytes(data[24:26] if old else data[28:30], "little")
    return "P" if bits <= 8 else "RGB"
