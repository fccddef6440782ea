"""How a picture is to be turned, read from its metadata by hand: what Pillow's `ImageOps.exif_transpose` honours.

    EXIF: the tag Orientation, of any numeric type but BYTE, in any byte order  ── absent ──► XMP: tiff:Orientation

Sources: Exif 2.32 section 4.6, TIFF 6.0 section 2, and Pillow's reader where writers differ from both.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Final

UPRIGHT: Final = 1

_TAG: Final = 0x0112
# how one value of each TIFF type is written. BYTE (1) is `c` with text and untyped bytes: Pillow reads no number of it
_TYPES: Final = dict(
    zip(range(1, 14), ("c", "c", "H", "I", "II", "b", "c", "h", "i", "ii", "f", "d", "I"), strict=True)
)
_TYPES[16] = "Q"
_ORDERS: Final = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}  # the last two are wrong, and common
_XMP: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def read(exif: bytes, xmp: bytes = b"") -> int:
    """Return the orientation, 1 to 8; 1 (upright) where there is none, or none that can be read."""
    value = _of_exif(re.sub(rb"\A(Exif\0\0){1,2}", b"", exif))
    if value is None:
        found = _XMP.search(xmp)
        value = int(found[1]) if found else UPRIGHT
    return int(value) if value in range(1, 9) else UPRIGHT


def _of_exif(tiff: bytes) -> float | None:
    """The tag's value, NaN for one that is no number; None where the first directory has no such tag."""
    order = _ORDERS.get(tiff[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(entries):
            at = directory + 2 + 12 * entry
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            size = count * struct.calcsize(order + _TYPES.get(kind, ""))
            if tag == _TAG and 0 < size <= len(tiff):
                return _number(tiff, order + _TYPES[kind], size, at + 8)
    except struct.error:  # the block is shorter than it declares: broken EXIF is ignored
        return None
    return None


def _number(tiff: bytes, form: str, size: int, at: int) -> float:
    """The first of a tag's values: in the entry itself where all of them fit its four bytes, else where it points."""
    if size > 4:
        (at,) = struct.unpack_from(f"{form[0]}I", tiff, at)
    value, *divisor = struct.unpack_from(form, tiff, at)
    if isinstance(value, bytes) or divisor == [0]:
        return math.nan
    return value / divisor[0] if divisor else value
