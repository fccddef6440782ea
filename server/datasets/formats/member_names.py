"""The names of an archive's members: which are dangerous, which are litter, and which are twins."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from server.errors import BadRequest

MAX_PATH: Final = 1024  # characters
MAX_PART: Final = 255
MAX_DEPTH: Final = 16
LITTER: Final = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # hidden files, .DS_Store among them, besides

_DRIVE: Final = re.compile(r"[A-Za-z]:")


def parts_of(name: str) -> tuple[str, ...]:
    """A member's path in parts. `BadRequest` for every name that could point outside of the archive."""
    if len(name) > MAX_PATH:
        raise _bad(name, f"its path has {len(name)} characters; at most {MAX_PATH} are allowed")
    if "\0" in name:
        raise _bad(name, "its name holds a NUL")
    if "\\" in name:
        raise _bad(name, "its name holds a backslash; expected / between folders")
    if name.startswith("/") or _DRIVE.match(name):
        raise _bad(name, "its path is absolute")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _bad(name, "its path leads out of the archive")
    if len(parts) > MAX_DEPTH:
        raise _bad(name, f"it lies {len(parts)} folders deep; at most {MAX_DEPTH} are allowed")
    if any(len(part) > MAX_PART for part in parts):
        raise _bad(name, f"a part of its path is longer than {MAX_PART} characters")
    return tuple(unicodedata.normalize("NFC", part) for part in parts)


def is_litter(parts: tuple[str, ...]) -> bool:
    """Hidden, or strewn about by an operating system."""
    return any(part.startswith(".") or part.casefold() in LITTER for part in parts)


def shown(text: str, limit: int = 200) -> str:
    """Text of unknown origin, fit for a message, a terminal and UTF-8: one printable line, shortened."""
    clean = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


class Names:
    """What an archive has named so far. Two names that some file system cannot keep apart are refused."""

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members
        self._members = 0
        self._folders: dict[str, str] = {}
        self._files: set[str] = set()

    def count(self) -> None:
        """One member more, of whatever kind."""
        self._members += 1
        if self._members > self._max_members:
            raise BadRequest(f"the archive has more than the {self._max_members:,} members allowed", code="bad_archive")

    def add(self, parts: tuple[str, ...]) -> None:
        """One file more."""
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            other = self._folders.setdefault(folder.casefold(), folder)
            if other != folder:
                raise _bad(folder, f"it differs from the folder {shown(other)!r} in case only")
        name = "/".join(parts)
        if name.casefold() in self._files:
            raise _bad(name, "the archive has two files of that name, perhaps in another case")
        self._files.add(name.casefold())


def _bad(name: str, why: str) -> BadRequest:
    return BadRequest(f"the archive's member {shown(name)!r} is refused: {why}", code="bad_archive")
