"""Finds the pictures of folders, and keeps account of what is left out.

Every file that is named like a picture or begins like one is a picture: of those that no server reads, such as TIFF or
HEIC, the answer is the server's refusal. Links are followed, except into a folder that contains them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ._images import UNKNOWN_TYPE, sniff

SHOWN = 3  # names of each kind of what is left out
_HEAD_BYTES = 32
_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".jpx", ".j2k", ".ico", ".dng", ".cr2"),
)
_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"})
_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})  # bytes


@dataclass
class LeftOut:
    """What of the folders is not sent: files that are no pictures, hidden files and folders, links that lead back."""

    other: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        """The counts with their reasons and a few names; empty if nothing is left out."""
        kinds = (("not pictures", self.other), ("hidden", self.hidden), ("in a loop of links", self.loops))
        return ", ".join(f"{len(paths)} {kind} ({_names(paths)})" for kind, paths in kinds if paths)

    def counts(self) -> dict[str, int]:
        return {"not_pictures": len(self.other), "hidden": len(self.hidden), "loops": len(self.loops)}


def pictures_in(paths: Iterable[Path], left_out: LeftOut) -> Iterator[Path]:
    """Yield named files, and a folder's pictures at any depth, sorted by name."""
    for path in paths:
        if path.is_dir():
            yield from _pictures(path, left_out, frozenset())
        else:
            yield path


def _pictures(folder: Path, left_out: LeftOut, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        left_out.loops.append(folder)
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        yield folder  # reading it fails as listing it did, and its row says so
        return
    for entry in entries:
        if entry.name.startswith("."):
            left_out.hidden.append(entry)
        elif entry.is_dir():
            yield from _pictures(entry, left_out, above | {real})
        elif _is_picture(entry):
            yield entry
        else:
            left_out.other.append(entry)


def _is_picture(path: Path) -> bool:
    """Whether a file is named or begins like a picture, or cannot be read, which its own row then says."""
    if path.name.lower().endswith(_SUFFIXES):
        return True
    if not path.is_file():
        return path.is_symlink()  # one that leads nowhere; a pipe or a socket is no picture
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return True
    if head.startswith(b"BM"):
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return sniff(head) != UNKNOWN_TYPE or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:SHOWN]) + (", …" if len(paths) > SHOWN else "")
