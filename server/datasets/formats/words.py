"""What was said about pictures, as a file of lines: the last word about a picture counts, an empty label withdraws it.

Whoever appends holds a lock of its own making; readers need none. A line that a dying process left half written has no
end: readers do not see it, and the next writer cuts it off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from server.datasets.disk import sync, write
from server.errors import Unavailable

MIN_LINES: Final = 1000  # a shorter file is not worth shortening
SPARE: Final = 3  # lines for each picture that still has a word, before the file is shortened


@dataclass(frozen=True, slots=True)
class Word:
    """The last word about a picture. `seq` grows from word to word; `at` is in seconds since the epoch."""

    seq: int
    sha256: str
    label: str
    bytes: int = 0
    width: int = 0
    height: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Words:
    """What a file says: the last word by picture, and how many `lines` in how many whole bytes (`end`) it took."""

    last: Mapping[str, Word]
    lines: int
    end: int

    @property
    def next_seq(self) -> int:
        return max((word.seq for word in self.last.values()), default=0) + 1

    def newest_first(self) -> list[Word]:
        return sorted(self.last.values(), key=lambda word: word.seq, reverse=True)


NOTHING: Final = Words({}, 0, 0)


class WordFile:
    """One file of words; what has been read of it is remembered until somebody changes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: tuple[tuple[int, int, int], Words] | None = None

    def read(self) -> Words:
        """Raises Unavailable for a damaged file."""
        try:
            with open(self._path, "rb") as file:
                signature = _signature(os.fstat(file.fileno()))
                known = self._known
                if known is not None and known[0] == signature:
                    return known[1]
                words = _parsed(file.read(signature[1]))
        except FileNotFoundError:
            return NOTHING
        self._known = signature, words
        return words

    def append(self, word: Word) -> None:
        """On the disk on return. The caller holds the lock."""
        words = self.read()
        if words.lines > max(MIN_LINES, SPARE * len(words.last)):
            words = self._shorten(words)
        data = _line(word)
        with open(self._path, "ab") as file:
            file.truncate(words.end)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(self._path, words.end)  # what was not acknowledged has not been said
                raise
            signature = _signature(os.fstat(file.fileno()))
        sync(self._path.parent)
        self._known = signature, Words(_after(words.last, word), words.lines + 1, words.end + len(data))

    def _shorten(self, words: Words) -> Words:
        """To one line for each picture that still has a word."""
        new = self._path.with_name("words.new")
        new.unlink(missing_ok=True)
        lines = [_line(word) for word in reversed(words.newest_first())]
        write(new, b"".join(lines))
        os.replace(new, self._path)
        return Words(words.last, len(lines), sum(map(len, lines)))


def _parsed(data: bytes) -> Words:
    end = data.rfind(b"\n") + 1
    lines = data[:end].splitlines()
    last: dict[str, Word] = {}
    try:
        for line in lines:
            word = Word(**json.loads(line))
            last.pop(word.sha256, None)
            if word.label:
                last[word.sha256] = word
    except (ValueError, TypeError) as error:
        raise Unavailable("the feedback is damaged on the server's disk", code="store_unavailable") from error
    return Words(last, len(lines), end)


def _after(last: Mapping[str, Word], word: Word) -> dict[str, Word]:
    others = {sha256: one for sha256, one in last.items() if sha256 != word.sha256}
    return {**others, word.sha256: word} if word.label else others


def _line(word: Word) -> bytes:
    return (json.dumps(asdict(word)) + "\n").encode()


def _signature(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
