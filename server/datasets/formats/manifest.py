"""A table of labels inside an archive: CSV with a heading, or one JSON object a line.

    labels.csv       file,label,split        a.jpg,cat,train
    metadata.jsonl   {"file_name": "a.jpg", "label": "cat"}

Names are relative to the table's folder: the archive's root, its one top folder, or a split folder (the layout of
Hugging Face's imagefolder). Names are only compared with those of the archive's pictures; no file is ever opened.
Raises `BadRequest` bad_dataset that says what was expected and what was found.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from server.datasets.example import Place, Skipped, Split
from server.errors import BadRequest

from .layout import ALIASES, MemberPath, label_of, split_of
from .member_names import parts_of, printable

NAMES: Final = frozenset(f"{stem}.{kind}" for stem in ("manifest", "labels", "metadata") for kind in ("csv", "jsonl"))
FILE_COLUMNS: Final = ("file", "file_name", "filename", "path", "image")
LABEL_COLUMNS: Final = ("label", "class")
MAX_DEPTH: Final = 3  # parts of a table's path: top folder, split folder, file
MAX_SHOWN: Final = 20  # columns in a message


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One row of a table: its line number; file, label and split as written, empty where missing."""

    line: int
    file: str
    label: str
    split: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of labels: its path in the archive, and its rows."""

    path: MemberPath
    rows: tuple[LabelRow, ...]

    @property
    def folder(self) -> MemberPath:
        return self.path[:-1]

    @property
    def name(self) -> str:
        return printable("/".join(self.path))


def is_table(path: MemberPath) -> bool:
    return len(path) <= MAX_DEPTH and path[-1].casefold() in NAMES


def labelling_tables(tables: Collection[MemberPath], pictures: Collection[MemberPath]) -> list[MemberPath]:
    """The tables in the root, in the pictures' common top folder, or in a split folder of one of these.

    Raises `BadRequest` bad_dataset where two tables apply to the same pictures.
    """
    tops = {path[0] if len(path) > 1 else "" for path in pictures}
    base: MemberPath = tuple(tops) if len(tops) == 1 and "" not in tops else ()
    chosen = [path for path in tables if path[:-1] in ((), base) or _in_split_folder(path, base)]
    folders = [path[:-1] for path in chosen]
    nested = [(a, b) for a in folders for b in folders if a != b and b[: len(a)] == a]
    if len(set(folders)) < len(folders) or nested:
        raise _bad(f"expected one table of labels, or one in each split folder, found: {_names(chosen)}")
    return chosen


def _in_split_folder(path: MemberPath, base: MemberPath) -> bool:
    folder = path[:-1]
    return bool(folder) and split_of(folder[-1]) is not None and folder[:-1] in ((), base)


def _names(paths: Collection[MemberPath]) -> str:
    return ", ".join(printable("/".join(path)) for path in sorted(paths)[:MAX_SHOWN])


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: MemberPath, data: bytes, max_rows: int) -> Table:
    name = printable("/".join(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(f"{name}: expected UTF-8, got something else at byte {error.start:,}") from error
    rows: list[LabelRow] = []
    for row in (_json_rows if path[-1].casefold().endswith(".jsonl") else _csv_rows)(name, text):
        if len(rows) == max_rows:
            raise _bad(f"{name} has more than the {max_rows:,} rows allowed")
        rows.append(row)
    if not rows:
        raise _bad(f"{name} has no rows")
    return Table(path, tuple(rows))


def _csv_rows(name: str, text: str) -> Iterator[LabelRow]:
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in next(cells, [])]
        file, label, split = (None if c is None else columns.index(c) for c in _columns(name, columns))
        for row in cells:
            if any(row):
                yield LabelRow(cells.line_num, _cell(row, file), _cell(row, label), _cell(row, split))
    except csv.Error as error:
        raise _bad(f"{name}, line {cells.line_num}: no valid CSV ({error})") from error


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _json_rows(name: str, text: str) -> Iterator[LabelRow]:
    columns: tuple[str, str, str | None] | None = None
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        row = _json_object(where, line)
        columns = columns or _columns(name, list(row))
        yield LabelRow(number, *(_text(where, row, column) for column in columns))


def _json_object(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{where}: expected a JSON object, got {printable(line.strip(), 60)!r}") from error
    if not isinstance(row, dict):
        raise _bad(f"{where}: expected a JSON object, got {printable(line.strip(), 60)!r}")
    return row


def _text(where: str, row: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else row.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _bad(f"{where}: expected a string or an integer as {column!r}, got {printable(json.dumps(value), 60)}")
    return str(value).strip()


def _columns(name: str, header: Sequence[str]) -> tuple[str, str, str | None]:
    """The names of the columns of file, label and, if there is one, split."""
    file = _single_column(name, FILE_COLUMNS, header)
    label = _single_column(name, LABEL_COLUMNS, header)
    split = [column for column in header if column.casefold() == "split"]
    if len(split) > 1:
        raise _bad(f"{name}: expected at most one column called split, found {len(split)}")
    return file, label, split[0] if split else None


def _single_column(name: str, expected: Sequence[str], header: Sequence[str]) -> str:
    matching = [column for column in header if column.casefold() in expected]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(repr(printable(column, 40)) for column in (matching or header)[:MAX_SHOWN]) or "none"
    raise _bad(f"{name}: expected exactly one column called {' or '.join(expected)}, found: {names}")


# --- placing ----------------------------------------------------------------------------------------------------------


def places(
    tables: Sequence[Table], pictures: Sequence[MemberPath], unreadable: Collection[MemberPath]
) -> tuple[list[Place], list[Skipped]]:
    """The place of each picture, and the rows that match none. `unreadable` files have been reported already."""
    index = _Index(pictures)
    placed: dict[MemberPath, tuple[str, LabelRow, Place]] = {}
    unmatched: list[Skipped] = []
    for table in tables:
        for row in table.rows:
            path = index.find(table.folder, row.file)
            if path is not None:
                _note(placed, path, table, row)
            elif not any(candidate in unreadable for candidate in _candidates(table.folder, row.file)):
                unmatched.append(Skipped(row.file, f"{table.name} lists it, but the archive has no such picture"))
    names = " or ".join(table.name for table in tables[:3])
    return [placed[path][2] if path in placed else f"not listed in {names}" for path in pictures], unmatched


def _note(placed: dict[MemberPath, tuple[str, LabelRow, Place]], path: MemberPath, table: Table, row: LabelRow) -> None:
    place = _place(table, row, path)
    name, other, before = placed.setdefault(path, (table.name, row, place))
    if before != place:
        lines = f"line {other.line} of {name} and line {row.line} of {table.name}"
        raise _bad(f"{lines} label {printable(row.file)!r} differently; expected one label a picture")


def _place(table: Table, row: LabelRow, path: MemberPath) -> Place:
    if not row.label:
        return f"{table.name} has no label for it"
    return _split(table, row, path), label_of(row.label)


def _split(table: Table, row: LabelRow, path: MemberPath) -> Split:
    """The row's split, else that of the table's folder or the picture's folder, else train."""
    if row.split:
        split = split_of(row.split)
        if split is None:
            where = f"{table.name}, line {row.line}"
            raise _bad(f"{where}: expected a split like {', '.join(ALIASES)}, got {printable(row.split, 40)!r}")
        return split
    folder_split = split_of(table.folder[-1]) if table.folder else None
    inner = path[len(table.folder) :]
    picture_split = split_of(inner[0]) if len(inner) > 1 else None
    return folder_split or picture_split or "train"


class _Index:
    """The pictures by path, and by file name where that is unique."""

    def __init__(self, pictures: Sequence[MemberPath]) -> None:
        self._paths = set(pictures)
        self._last: dict[str, list[MemberPath]] = defaultdict(list)
        for path in pictures:
            self._last[path[-1]].append(path)

    def find(self, folder: MemberPath, file: str) -> MemberPath | None:
        candidates = _candidates(folder, file)
        exact = next((path for path in candidates if path in self._paths), None)
        if exact or not candidates or len(candidates[-1]) > 1:
            return exact
        matches = [path for path in self._last[candidates[-1][0]] if path[: len(folder)] == folder]
        return matches[0] if len(matches) == 1 else None


def _candidates(folder: MemberPath, file: str) -> tuple[MemberPath, ...]:
    """The paths that a row may mean: below its table's folder, or from the root. Never outside the archive."""
    try:
        parts = parts_of(file.replace("\\", "/"))
    except BadRequest:
        return ()
    return ((*folder, *parts), parts) if parts else ()


def _bad(detail: str) -> BadRequest:
    return BadRequest(detail, code="bad_dataset")
