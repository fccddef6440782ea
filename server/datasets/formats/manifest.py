"""A table of labels inside an archive: CSV with a heading, or one JSON object a line; parquet arrives as the latter.

    labels.csv       file,label,split        a.jpg,cat,train
    metadata.jsonl   {"file_name": "a.jpg", "label": "cat"}

Names are relative to the table's folder: the archive's root, its one top folder, or a split folder (the layout of
Hugging Face's imagefolder). See `picture_index` for names that are written otherwise; no file is ever opened.
Raises `BadRequest` bad_dataset that says what was expected and what was found.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from server.datasets.example import Place, Skipped, Split
from server.datasets.label import label_of
from server.errors import BadRequest

from .layout import MemberPath
from .member_names import printable
from .picture_index import PictureIndex
from .split_names import ALIASES, split_of
from .table_columns import columns_of_table

STEMS: Final = ("manifest", "labels", "metadata")
NAMES: Final = frozenset(f"{stem}.{kind}" for stem in STEMS for kind in ("csv", "jsonl", "parquet"))
NO_LABEL: Final = frozenset({"", "NaN", "nan", "<NA>", "NULL", "null"})  # "NA" and "None" may be classes
MAX_DEPTH: Final = 4  # parts of a table's path: two wrappers, split folder, file
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
    """The tables in the root, in a folder around all pictures, or in a split folder of one of these.

    Raises `BadRequest` bad_dataset where two tables apply to the same pictures.
    """
    levels = zip(*(path[:-1] for path in pictures), strict=False)
    common = tuple(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))
    bases = {common[:depth] for depth in range(len(common) + 1)}
    chosen = [path for path in tables if path[:-1] in bases or _in_split_folder(path, bases)]
    folders = [path[:-1] for path in chosen]
    nested = [(a, b) for a in folders for b in folders if a != b and b[: len(a)] == a]
    if len(set(folders)) < len(folders) or nested:
        raise _bad(f"expected one table of labels, or one in each split folder, found: {_names(chosen)}")
    return chosen


def _in_split_folder(path: MemberPath, bases: Collection[MemberPath]) -> bool:
    folder = path[:-1]
    return bool(folder) and split_of(folder[-1]) is not None and folder[:-1] in bases


def _names(paths: Collection[MemberPath]) -> str:
    return ", ".join(printable("/".join(path)) for path in sorted(paths)[:MAX_SHOWN])


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: MemberPath, data: bytes, max_rows: int, label_column: str | None = None) -> Table:
    """The table; its labels are in `label_column`, else in a column with a customary name."""
    name = printable("/".join(path))
    text = _text_of(name, data)
    rows: list[LabelRow] = []
    for row in (_csv_rows if path[-1].casefold().endswith(".csv") else _json_rows)(name, text, label_column):
        if len(rows) == max_rows:
            raise _bad(f"{name} has more than the {max_rows:,} rows allowed")
        rows.append(row)
    if not rows:
        raise _bad(f"{name} has no rows")
    return Table(path, tuple(rows))


def _text_of(name: str, data: bytes) -> str:
    """The text by its byte order mark, else as UTF-8; a guessed encoding would silently change labels."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[data.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
        latin = printable(line.decode("cp1252", "replace").strip(), 60)
        reading = "" if utf16 else f" (as Windows-1252 its line reads {latin!r})"
        got = f"got something else at byte {error.start:,}{reading}"
        raise _bad(f"{name}: expected UTF-8, or UTF-16 with a byte order mark, {got}; save it as UTF-8") from error
    if "\0" in text:
        raise _bad(f"{name}: expected UTF-8, or UTF-16 with a byte order mark, got zero bytes; save it as UTF-8")
    return text


def _csv_rows(name: str, text: str, label_column: str | None) -> Iterator[LabelRow]:
    first, _, rest = text.partition("\n")
    declared = re.fullmatch(r"sep=([^\w\s\"]|\t)\r?", first, re.IGNORECASE)  # as Excel writes it
    heading = rest.partition("\n")[0] if declared else first
    delimiter = declared[1] if declared else max(",;\t|", key=heading.count)
    spaced = f"{delimiter} " in heading  # else a blank belongs to a label
    try:
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True)
        if declared:
            next(cells)
        columns = [column.strip() for column in next(cells, [])]
        file, label, split = (
            None if c is None else columns.index(c) for c in columns_of_table(name, columns, label_column)
        )
        for row in cells:
            if any(row):
                yield LabelRow(cells.line_num, _cell(row, file).strip(), _cell(row, label), _cell(row, split).strip())
    except csv.Error as error:
        raise _bad(f"{name}, line {cells.line_num}: no valid CSV ({error})") from error


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column] if column is not None and column < len(row) else ""


def _json_rows(name: str, text: str, label_column: str | None) -> Iterator[LabelRow]:
    columns: tuple[str, str, str | None] | None = None
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        row = _json_object(where, line)
        columns = columns or columns_of_table(name, list(row), label_column)
        file, label, split = (_text(where, row, column) for column in columns)
        yield LabelRow(number, file.strip(), label, split.strip())


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
    if value is None or value != value:  # noqa: PLR0124  # NaN, which Python's json writes and reads
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _bad(f"{where}: expected a string or an integer as {column!r}, got {printable(json.dumps(value), 60)}")
    return str(value)


# --- placing ----------------------------------------------------------------------------------------------------------


def places(
    tables: Sequence[Table], pictures: Sequence[MemberPath], unreadable: Collection[MemberPath]
) -> tuple[list[Place], list[Skipped]]:
    """The place of each picture, and the rows that match none. `unreadable` files have been reported already."""
    placed: dict[MemberPath, tuple[str, LabelRow, Place]] = {}
    unmatched: list[Skipped] = []
    index = PictureIndex([*pictures, *unreadable])
    for table in tables:
        inside = index.within(table.folder)
        for row in table.rows:
            path = inside.find(row.file)
            if path is None:
                unmatched.append(Skipped(row.file, f"{table.name} lists it, but the archive has no such picture"))
            elif path not in unreadable:
                _note(placed, path, table, row)
    names = " or ".join(table.name for table in tables[:3])
    return [placed[path][2] if path in placed else f"not listed in {names}" for path in pictures], unmatched


def _note(placed: dict[MemberPath, tuple[str, LabelRow, Place]], path: MemberPath, table: Table, row: LabelRow) -> None:
    place = _place(table, row, path)
    name, other, before = placed.setdefault(path, (table.name, row, place))
    if before != place:
        lines = f"line {other.line} of {name} and line {row.line} of {table.name}"
        raise _bad(f"{lines} label {printable(row.file)!r} differently; expected one label a picture")


def _place(table: Table, row: LabelRow, path: MemberPath) -> Place:
    if row.label.strip() in NO_LABEL:
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
    for folder in (*table.folder[-1:], *path[len(table.folder) : -1]):
        if (folder_split := split_of(folder)) is not None:
            return folder_split
    return "train"


def _bad(detail: str) -> BadRequest:
    return BadRequest(detail, code="bad_dataset")
