"""Finds the picture that a table's row means, by its path as written, else by what people and tools change of it.

In this order: the path as it is; in another case or Unicode form; without its extension; each also as the end of a
longer path (/home/me/pets/cat/1.jpg where the archive has cat/1.jpg). Of a relative path the picture's folder has to
fit, so that cat/1.jpg is never dog/1.jpg. A name that fits several pictures fits none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Final

from .layout import MemberPath

_FROM_ELSEWHERE: Final = re.compile(r"[/\\~]|\.\.[/\\]|[A-Za-z][A-Za-z0-9+.-]*:")  # a root, a drive, a URL, …

Ends = dict[MemberPath, MemberPath | None]  # the last parts of a path → the path; None where several end so


class PictureIndex:
    """The pictures below `folder`, to which the names in a table there are relative."""

    def __init__(self, pictures: Iterable[MemberPath], folder: MemberPath = ()) -> None:
        self._folder = folder
        self._pictures = [path for path in pictures if path[: len(folder)] == folder]

    def within(self, folder: MemberPath) -> PictureIndex:
        return PictureIndex(self._pictures, folder)

    def find(self, file: str) -> MemberPath | None:
        """The picture; None where there is none or more than one."""
        parts = tuple(part for part in re.split(r"[/\\]", file) if part not in ("", ".", ".."))
        if not parts:
            return None
        for exact in ((*self._folder, *parts), parts):
            if exact in self._paths:
                return exact
        elsewhere = _FROM_ELSEWHERE.match(file) is not None
        key = _folded(parts)
        for ends in (self._names, self._stems):
            for length in range(len(key), 0, -1):
                if key[-length:] in ends:
                    path = ends[key[-length:]]
                    whole = path is not None and length == len(path) - len(self._folder)
                    return path if length == len(key) or length > 1 or whole or elsewhere else None
        return None

    @cached_property
    def _paths(self) -> frozenset[MemberPath]:
        return frozenset(self._pictures)

    @cached_property
    def _names(self) -> Ends:
        return _ends(self._pictures, lambda path: path)

    @cached_property
    def _stems(self) -> Ends:
        return _ends(self._pictures, lambda path: (*path[:-1], path[-1].rpartition(".")[0]))


def _ends(pictures: Iterable[MemberPath], named: Callable[[MemberPath], MemberPath]) -> Ends:
    ends: Ends = {}
    for path in pictures:
        key = _folded(named(path))
        for first in range(len(key)):
            if ends.setdefault(key[first:], path) != path:
                ends[key[first:]] = None
    return ends


def _folded(parts: MemberPath) -> MemberPath:
    return tuple(unicodedata.normalize("NFC", part).casefold() for part in parts)
