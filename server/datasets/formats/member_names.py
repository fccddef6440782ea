"""The names of an archive's members: dangerous ones, hidden files, and names that collide."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from server.errors import BadRequest

from .metering import bad_archive, too_many_members

MAX_PATH: Final = 1024  # characters
MAX_PART: Final = 255
MAX_DEPTH: Final = 16
LITTER: Final = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # beside hidden files such as .DS_Store

_DRIVE: Final = re.compile(r"[A-Za-z]:")


def parts_of(name: str) -> tuple[str, ...]:
    """A member's path in parts. Raises `BadRequest` for every name that could point outside the archive."""
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
    return tuple(unicodedata.normalize("NFC", part) for part in parts)


def is_litter(parts: tuple[str, ...]) -> bool:
    """Whether a member is hidden, or metadata that an operating system added."""
    return any(part.startswith(".") or part.casefold() in LITTER for part in parts)


def printable(text: str, limit: int = 200) -> str:
    """Untrusted text made safe for a message or a terminal: one printable line of at most `limit` characters."""
    clean = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


class Names:
    """The names an archive has used so far. Refuses names that some file systems cannot tell apart."""

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members
        self._members = 0
        self._folders: dict[str, str] = {}
        self._files: set[str] = set()

    def count(self) -> None:
        """Count a member of any kind. Raises `BadRequest` beyond `max_members`."""
        self._members += 1
        if self._members > self._max_members:
            raise too_many_members(self._max_members)

    def add(self, parts: tuple[str, ...]) -> None:
        """Add a file's path. Raises `BadRequest` when it collides with another."""
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            other = self._folders.setdefault(folder.casefold(), folder)
            if other != folder:
                raise _bad(folder, f"it differs from the folder {printable(other)!r} in case only")
        name = "/".join(parts)
        if name.casefold() in self._files:
            raise _bad(name, "the archive has two files of that name, perhaps in another case")
        self._files.add(name.casefold())


def _bad(name: str, why: str) -> BadRequest:
    return bad_archive(f"the archive's member {printable(name)!r} is refused: {why}")
