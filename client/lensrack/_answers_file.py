"""A CSV of answers that grows by a row at a time, and that a run which broke off can go on with.

    image, task, version, label, score[, label_2, score_2, …], error

A row is whole or it is not there: what a run left half written goes when the next one begins, and so do the rows of
images that got no answer, for these are asked again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from .answers import Answer
from .errors import ApiError, InvalidInput, LensrackError

_ERRORS = "surrogateescape"  # a file's name need not be text
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def images_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as they are named, and of folders the pictures at any depth, by name; hidden ones and links left out."""
    for path in paths:
        if path.is_dir():
            yield from _pictures(path)
        else:
            yield path


def _pictures(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            yield from _pictures(entry)
        elif entry.suffix.lower() in SUFFIXES:
            yield entry


def columns(top_k: int) -> list[str]:
    ranks = ["", *(f"_{rank}" for rank in range(2, top_k + 1))]
    return ["image", "task", "version", *(f"{name}{rank}" for rank in ranks for name in ("label", "score")), "error"]


class AnswersFile:
    """`done`: the images that have their answers already. Raises InvalidInput for a file that is none of this run's."""

    def __init__(self, path: Path, task: str, top_k: int, *, resume: bool, force: bool) -> None:
        self.path, self._task, self._columns = path, task, columns(top_k)
        there = path.exists()
        if there and not (resume or force):
            raise InvalidInput(f"{path} is there already: --resume goes on with it, --force begins anew")
        kept = self._whole_rows() if there and resume else []
        self.done = {row[0] for row in kept}
        self._begin(kept)
        self._file = path.open("a", encoding="utf-8", errors=_ERRORS, newline="")

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def write(self, image: Path, told: Answer | LensrackError) -> None:
        """One write for the whole row, so that a run that is killed loses at most the row it was at."""
        self._file.write(_lines([self._row(image, told)]))
        self._file.flush()

    def _row(self, image: Path, told: Answer | LensrackError) -> list[str]:
        width = len(self._columns)
        if isinstance(told, LensrackError):
            code = told.code if isinstance(told, ApiError) else type(told).__name__
            return [str(image), self._task, *[""] * (width - 3), f"{code}: {told}"]
        ranked = [text for best in told for text in (best.label, repr(best.score))]
        return [str(image), self._task, told.version, *ranked, *[""] * (width - 4 - len(ranked)), ""]

    def _whole_rows(self) -> list[list[str]]:
        text = self.path.read_text(encoding="utf-8", errors=_ERRORS)
        found = list(csv.reader(io.StringIO(text, newline="")))
        if text and not text.endswith("\n"):
            found.pop()
        if not found:
            return []
        if found[0] != self._columns or any(row[1:2] not in ([], [self._task]) for row in found[1:]):
            raise InvalidInput(f"{self.path} is of another question: expected {self._task}, {','.join(self._columns)}")
        return [row for row in found[1:] if len(row) == len(self._columns) and not row[-1]]

    def _begin(self, kept: list[list[str]]) -> None:
        """The heading and what is kept, in place of what was there, at once."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(_lines([self._columns, *kept]), encoding="utf-8", errors=_ERRORS, newline="")
        beside.replace(self.path)


def _lines(rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
