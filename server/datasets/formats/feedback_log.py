"""An append-only log of picture labels, one JSON object a line: the last entry of a picture counts; an empty label
removes the picture.

Writers hold a lock of the caller's; readers need none. A line that a dying process left half written has no line end:
readers ignore it, and the next writer cuts it off.
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
SPARE: Final = 3  # lines for each labelled picture, beyond which the file is shortened


@dataclass(frozen=True, slots=True)
class FeedbackEntry:
    """One label of a picture. `seq` grows from entry to entry; `at` is in seconds since the epoch."""

    seq: int
    sha256: str
    label: str
    bytes: int = 0
    width: int = 0
    height: int = 0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class FeedbackLog:
    """The state of a log file: the last entry by picture, the number of lines, and their size in bytes (`end`)."""

    last: Mapping[str, FeedbackEntry]
    lines: int
    end: int

    @property
    def next_seq(self) -> int:
        return max((entry.seq for entry in self.last.values()), default=0) + 1

    def newest_first(self) -> list[FeedbackEntry]:
        return sorted(self.last.values(), key=lambda entry: entry.seq, reverse=True)


EMPTY_LOG: Final = FeedbackLog({}, 0, 0)


class FeedbackLogFile:
    """One log file; its parsed content is cached until the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cached: tuple[tuple[int, int, int], FeedbackLog] | None = None

    def read(self) -> FeedbackLog:
        """Raises Unavailable for a damaged file."""
        try:
            with open(self._path, "rb") as file:
                signature = _signature(os.fstat(file.fileno()))
                cached = self._cached
                if cached is not None and cached[0] == signature:
                    return cached[1]
                log = _parse(file.read(signature[1]))
        except FileNotFoundError:
            return EMPTY_LOG
        self._cached = signature, log
        return log

    def append(self, entry: FeedbackEntry) -> None:
        """Append an entry, on the disk on return. The caller holds the lock."""
        log = self.read()
        if log.lines > max(MIN_LINES, SPARE * len(log.last)):
            log = self._shorten(log)
        data = _line(entry)
        with open(self._path, "ab") as file:
            file.truncate(log.end)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                os.truncate(self._path, log.end)  # an entry that was not acknowledged must not be there
                raise
            signature = _signature(os.fstat(file.fileno()))
        sync(self._path.parent)
        self._cached = signature, FeedbackLog(_with_entry(log.last, entry), log.lines + 1, log.end + len(data))

    def _shorten(self, log: FeedbackLog) -> FeedbackLog:
        """Rewrite the file with one line for each labelled picture."""
        new = self._path.with_name("words.new")
        new.unlink(missing_ok=True)
        lines = [_line(entry) for entry in reversed(log.newest_first())]
        write(new, b"".join(lines))
        os.replace(new, self._path)
        return FeedbackLog(log.last, len(lines), sum(map(len, lines)))


def _parse(data: bytes) -> FeedbackLog:
    end = data.rfind(b"\n") + 1
    lines = data[:end].splitlines()
    last: dict[str, FeedbackEntry] = {}
    try:
        for line in lines:
            entry = FeedbackEntry(**json.loads(line))
            last.pop(entry.sha256, None)
            if entry.label:
                last[entry.sha256] = entry
    except (ValueError, TypeError) as error:
        raise Unavailable("the feedback is damaged on the server's disk", code="store_unavailable") from error
    return FeedbackLog(last, len(lines), end)


def _with_entry(last: Mapping[str, FeedbackEntry], entry: FeedbackEntry) -> dict[str, FeedbackEntry]:
    others = {sha256: other for sha256, other in last.items() if sha256 != entry.sha256}
    return {**others, entry.sha256: entry} if entry.label else others


def _line(entry: FeedbackEntry) -> bytes:
    return (json.dumps(asdict(entry)) + "\n").encode()


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
