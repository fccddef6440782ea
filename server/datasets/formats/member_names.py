"""The names of an archive's members: their encoding, dangerous ones, hidden files, and names that occur twice.

A name is text exactly as the archive has it, never normalised: folders become labels, and two folders are never one.
Bytes that are not UTF-8 arrive as surrogates (PEP 383), which keeps different bytes different.
"""

from __future__ import annotations

import re
from typing import Final

from server.errors import BadRequest

from .metering import bad_archive, too_many_members

MAX_PATH: Final = 1024  # characters
MAX_PART: Final = 255
MAX_DEPTH: Final = 16
LITTER: Final = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # beside hidden files such as .DS_Store

_DRIVE: Final = re.compile(r"[A-Za-z]:")
_JOINERS: Final = "\u200c\u200d"
_LOST: Final = "\N{REPLACEMENT CHARACTER}"
_CODE_PAGES: Final = ("cp437", "cp866", "cp1251", "cp1252", "gbk", "cp932")  # whose readings are shown


def parts_of(name: str) -> tuple[str, ...]:
    """A member's path in parts. Raises `BadRequest` for every name that could point outside the archive, and for a
    folder's name that is not UTF-8; in the name of a file such bytes become escapes like \\xe9."""
    if len(name) > MAX_PATH:
        raise _bad(name, f"its path has {len(name)} characters; at most {MAX_PATH} are allowed")
    if "\0" in name:
        raise _bad(name, "its name contains a NUL")
    if "\\" in name:
        raise _bad(name, "its name contains a backslash; expected / between folders")
    if name.startswith("/") or _DRIVE.match(name):
        raise _bad(name, "its path is absolute")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _bad(name, "its path leads out of the archive")
    if len(parts) > MAX_DEPTH:
        raise _bad(name, f"it is {len(parts)} folders deep; at most {MAX_DEPTH} are allowed")
    if any(len(part) > MAX_PART for part in parts):
        raise _bad(name, f"a part of its path is longer than {MAX_PART} characters")
    return (*map(_folder, parts[:-1]), _escaped(parts[-1])) if parts else ()


def _folder(part: str) -> str:
    """The part unchanged. Raises `BadRequest` unless it is UTF-8: a guessed code page would silently change a label."""
    if _escaped(part) == part:
        return part
    raw = part.encode("utf-8", "surrogateescape")
    readings = [(page, raw.decode(page, "replace")) for page in _CODE_PAGES]
    likely = [f"{page} reads {text!r}" for page, text in readings if text.isprintable() and _LOST not in text]
    why = f"its name is not UTF-8 but in a code page that the archive does not name ({', '.join(likely) or 'unknown'})"
    raise _bad(part, f"{why}; pack the folder again with UTF-8 names")


def _escaped(part: str) -> str:
    return part.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_litter(parts: tuple[str, ...]) -> bool:
    """Whether a member is hidden, or metadata that an operating system added."""
    return any(part.startswith(".") or part.casefold() in LITTER for part in parts)


def printable(text: str, limit: int = 200) -> str:
    """Untrusted text made safe for a message or a terminal: one printable line of at most `limit` characters. Joiners,
    which are parts of words and emoji, stay."""
    clean = "".join(letter if letter.isprintable() or letter in _JOINERS else _LOST for letter in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


class Names:
    """The names an archive has used so far. No file is written under its name, so names that some file systems cannot
    tell apart (in case, in Unicode form) are names like any other."""

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members
        self._members = 0
        self._files: set[tuple[str, ...]] = set()

    def count(self) -> None:
        """Count a member of any kind. Raises `BadRequest` beyond `max_members`."""
        self._members += 1
        if self._members > self._max_members:
            raise too_many_members(self._max_members)

    def add(self, parts: tuple[str, ...]) -> None:
        """Add a file's path. Raises `BadRequest` where it occurs twice."""
        if parts in self._files:
            raise _bad("/".join(parts), "the archive has two files of that name")
        self._files.add(parts)


def _bad(name: str, why: str) -> BadRequest:
    return bad_archive(f"the archive's member {printable(name)!r} is refused: {why}")
