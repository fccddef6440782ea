"""A CSV of answers, written row by row, which a later run can resume.

    image, task, version, label, score[, label_2, score_2, …], error

Resuming removes an unfinished last row, and the rows of images that failed, because these are sent again.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from types import TracebackType

from .answers import Answer
from .errors import ApiError, InvalidInput, LensrackError

_ERRORS = "surrogateescape"  # a file name need not be valid text


def columns(top_k: int) -> list[str]:
    ranks = ["", *(f"_{rank}" for rank in range(2, top_k + 1))]
    return ["image", "task", "version", *(f"{name}{rank}" for rank in ranks for name in ("label", "score")), "error"]


class AnswersFile:
    """A CSV being written. `done`: images with an answer from an earlier run.

    Raises InvalidInput for a file that exists, or belongs to another task or `top_k`.
    """

    def __init__(self, path: Path, task: str, top_k: int, *, resume: bool, force: bool) -> None:
        self.path, self._task, self._columns = path, task, columns(top_k)
        exists = path.exists()
        if exists and not (resume or force):
            raise InvalidInput(f"{path} exists: --resume continues it, --force replaces it")
        kept = self._complete_rows() if exists and resume else []
        self.done = {row[0] for row in kept}
        self._rewrite(kept)
        self._file = path.open("a", encoding="utf-8", errors=_ERRORS, newline="")

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def write(self, image: Path, answer: Answer | LensrackError) -> None:
        """Append a row by a single write, so that a killed run loses at most its last row."""
        self._file.write(_lines([self._row(image, answer)]))
        self._file.flush()

    def _row(self, image: Path, answer: Answer | LensrackError) -> list[str]:
        width = len(self._columns)
        if isinstance(answer, LensrackError):
            code = answer.code if isinstance(answer, ApiError) else type(answer).__name__
            return [str(image), self._task, *[""] * (width - 3), f"{code}: {answer}"]
        ranked = [text for best in answer for text in (best.label, repr(best.score))]
        return [str(image), self._task, answer.version, *ranked, *[""] * (width - 4 - len(ranked)), ""]

    def _complete_rows(self) -> list[list[str]]:
        text = self.path.read_text(encoding="utf-8", errors=_ERRORS)
        rows = list(csv.reader(io.StringIO(text, newline="")))
        if text and not text.endswith("\n"):
            rows.pop()
        if not rows:
            return []
        if rows[0] != self._columns or any(row[1:2] not in ([], [self._task]) for row in rows[1:]):
            columns = ",".join(self._columns)
            raise InvalidInput(f"{self.path} is of another run: expected task {self._task} and columns {columns}")
        return [row for row in rows[1:] if len(row) == len(self._columns) and not row[-1]]

    def _rewrite(self, kept: list[list[str]]) -> None:
        """Replace the file atomically by the heading and the kept rows."""
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        new.write_text(_lines([self._columns, *kept]), encoding="utf-8", errors=_ERRORS, newline="")
        new.replace(self.path)


def _lines(rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
