"""Reads zip and tar as hostile input: an iterator of members; no file is ever written under its name.

The kind is sniffed from the content. What an archive claims about itself is checked before it is used, and what it
really unpacks to is counted while it is read. Every refusal is a `BadRequest` bad_archive that says what is wrong.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Final, Literal

from .member_names import Names
from .metering import Limits, Member, bad_archive
from .tar_members import BLOCK, tar_members
from .zip_members import zip_members

__all__ = ["BLOCK", "Kind", "Limits", "Member", "looks_like_archive", "members", "sniff"]

Kind = Literal["zip", "tar", "tar.gz", "tar.zst", "tar.bz2", "tar.xz"]

_MAGIC: Final[dict[Kind, re.Pattern[bytes]]] = {
    "zip": re.compile(rb"PK(\x03\x04|\x05\x06)"),
    "tar.gz": re.compile(rb"\x1f\x8b"),
    "tar.zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # or a skippable frame: RFC 8878, 3.1.2
    "tar.bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # with the magic of a first block, or of none
    "tar.xz": re.compile(rb"\xfd7zXZ\0"),
}
_OTHER_ARCHIVES: Final = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07")
_DOCUMENTS: Final = (".docx", ".xlsx", ".pptx", ".odt", ".ods", ".odp", ".epub")  # zips too, but not archives of files


def members(file: BinaryIO, limits: Limits) -> Iterator[Member]:
    """The files of an archive in their order, without folders and the hidden files of operating systems.

    Raises `BadRequest` bad_archive.
    """
    file.seek(0)
    kind = sniff(file.read(BLOCK))
    file.seek(0)
    if kind is None:
        start = file.read(4).hex(" ") or "nothing"
        expected = "a zip, tar, tar.gz, tar.zst, tar.bz2 or tar.xz archive, a parquet file or an npz"
        raise bad_archive(f"expected {expected}, got a file that begins with {start}")
    names = Names(limits.max_members)
    if kind == "zip":
        yield from zip_members(file, limits, names)
    else:
        yield from tar_members(file, limits, names, kind)


def sniff(head: bytes) -> Kind | None:
    """The kind of archive that begins with these 512 bytes; None for anything else."""
    for kind, magic in _MAGIC.items():
        if magic.match(head):
            return kind
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "replace")
    except (tarfile.HeaderError, ValueError):
        return None
    return "tar"


def looks_like_archive(name: str, data: bytes) -> bool:
    """Whether a member is itself an archive, of any common kind."""
    head = data[:BLOCK]
    return (sniff(head) is not None or head.startswith(_OTHER_ARCHIVES)) and not name.lower().endswith(_DOCUMENTS)
