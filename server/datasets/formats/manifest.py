"""A table inside an archive that says what its pictures are: CSV with a heading, or one JSON object a line.

    labels.csv       file,label,split        a.jpg,cat,train
    metadata.jsonl   {"file_name": "a.jpg", "label": "cat"}

Names are relative to the table's folder: the archive's root, its one top folder, or a split folder (the layout of
Hugging Face's imagefolder). A name is only ever compared with the names of pictures that are there; nothing is opened.
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

from .layout import ALIASES, Path, label_of, split_of
from .member_names import parts_of, shown

NAMES: Final = frozenset(f"{stem}.{kind}" for stem in ("manifest", "labels", "metadata") for kind in ("csv", "jsonl"))
FILE_COLUMNS: Final = ("file", "file_name", "filename", "path", "image")
LABEL_COLUMNS: Final = ("label", "class")
MAX_DEPTH: Final = 3  # top folder, split folder, table
MAX_SHOWN: Final = 20  # columns in a message


@dataclass(frozen=True, slots=True)
class Row:
    line: int
    file: str
    label: str
    split: str


@dataclass(frozen=True, slots=True)
class Table:
    path: Path
    rows: tuple[Row, ...]

    @property
    def folder(self) -> Path:
        return self.path[:-1]

    @property
    def name(self) -> str:
        return shown("/".join(self.path))


def is_table(path: Path) -> bool:
    return len(path) <= MAX_DEPTH and path[-1].casefold() in NAMES


def tables_that_count(found: Collection[Path], pictures: Collection[Path]) -> list[Path]:
    """Those in the root, in the one folder that holds all the pictures, or in a split folder of these."""
    tops = {path[0] if len(path) > 1 else "" for path in pictures}
    base: Path = tuple(tops) if len(tops) == 1 and "" not in tops else ()
    chosen = [path for path in found if path[:-1] in ((), base) or _in_split_folder(path, base)]
    folders = [path[:-1] for path in chosen]
    nested = [(a, b) for a in folders for b in folders if a != b and b[: len(a)] == a]
    if len(set(folders)) < len(folders) or nested:
        raise _bad(f"expected one table of labels, or one in each split folder, found: {_names(chosen)}")
    return chosen


def _in_split_folder(path: Path, base: Path) -> bool:
    folder = path[:-1]
    return bool(folder) and split_of(folder[-1]) is not None and folder[:-1] in ((), base)


def _names(paths: Collection[Path]) -> str:
    return ", ".join(shown("/".join(path)) for path in sorted(paths)[:MAX_SHOWN])


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, data: bytes, max_rows: int) -> Table:
    name = shown("/".join(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(f"{name}: expected UTF-8, got something else at byte {error.start:,}") from error
    rows: list[Row] = []
    for row in (_json_rows if path[-1].casefold().endswith(".jsonl") else _csv_rows)(name, text):
        if len(rows) == max_rows:
            raise _bad(f"{name} has more than the {max_rows:,} rows allowed")
        rows.append(row)
    if not rows:
        raise _bad(f"{name} has no rows")
    return Table(path, tuple(rows))


def _csv_rows(name: str, text: str) -> Iterator[Row]:
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in next(cells, [])]
        file, label, split = (None if one is None else columns.index(one) for one in _columns(name, columns))
        for row in cells:
            if any(row):
                yield Row(cells.line_num, _cell(row, file), _cell(row, label), _cell(row, split))
    except csv.Error as error:
        raise _bad(f"{name}, line {cells.line_num}: no valid CSV ({error})") from error


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def _json_rows(name: str, text: str) -> Iterator[Row]:
    columns: tuple[str, str, str | None] | None = None
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        about = f"{name}, line {number}"
        row = _json_object(about, line)
        columns = columns or _columns(name, list(row))
        yield Row(number, *(_text(about, row, column) for column in columns))


def _json_object(about: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad(f"{about}: expected a JSON object, got {shown(line.strip(), 60)!r}") from error
    if not isinstance(row, dict):
        raise _bad(f"{about}: expected a JSON object, got {shown(line.strip(), 60)!r}")
    return row


def _text(about: str, row: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else row.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _bad(f"{about}: expected a text or a whole number as {column!r}, got {shown(json.dumps(value), 60)}")
    return str(value).strip()


def _columns(name: str, found: Sequence[str]) -> tuple[str, str, str | None]:
    """The columns of file, label and, if there is one, split."""
    file = _one_of(name, FILE_COLUMNS, found)
    label = _one_of(name, LABEL_COLUMNS, found)
    split = [column for column in found if column.casefold() == "split"]
    if len(split) > 1:
        raise _bad(f"{name}: expected at most one column called split, found {len(split)}")
    return file, label, split[0] if split else None


def _one_of(name: str, expected: Sequence[str], found: Sequence[str]) -> str:
    fitting = [column for column in found if column.casefold() in expected]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(repr(shown(column, 40)) for column in (fitting or found)[:MAX_SHOWN]) or "none"
    raise _bad(f"{name}: expected exactly one column called {' or '.join(expected)}, found: {there}")


# --- placing ----------------------------------------------------------------------------------------------------------


def places(
    tables: Sequence[Table], pictures: Sequence[Path], unreadable: Collection[Path]
) -> tuple[list[Place], list[Skipped]]:
    """The place of each picture, and the rows that name none. `unreadable` files have been told of already."""
    index = _Index(pictures)
    placed: dict[Path, tuple[str, Row, Place]] = {}
    lost: list[Skipped] = []
    for table in tables:
        for row in table.rows:
            path = index.find(table.folder, row.file)
            if path is not None:
                _note(placed, path, table, row)
            elif not any(one in unreadable for one in _candidates(table.folder, row.file)):
                lost.append(Skipped(row.file, f"{table.name} names it, and the archive has no such picture"))
    named = " or ".join(table.name for table in tables[:3])
    return [placed[path][2] if path in placed else f"{named} does not name it" for path in pictures], lost


def _note(placed: dict[Path, tuple[str, Row, Place]], path: Path, table: Table, row: Row) -> None:
    place = _place(table, row, path)
    name, other, before = placed.setdefault(path, (table.name, row, place))
    if before != place:
        lines = f"line {other.line} of {name} and line {row.line} of {table.name}"
        raise _bad(f"{lines} say different things of {shown(row.file)!r}; expected one label a picture")


def _place(table: Table, row: Row, path: Path) -> Place:
    if not row.label:
        return f"{table.name} gives it no label"
    return _split(table, row, path), label_of(row.label)


def _split(table: Table, row: Row, path: Path) -> Split:
    """As the row says, or else as the table's folder, or the picture's, is called."""
    if row.split:
        said = split_of(row.split)
        if said is None:
            about = f"{table.name}, line {row.line}"
            raise _bad(f"{about}: expected a split like {', '.join(ALIASES)}, got {shown(row.split, 40)!r}")
        return said
    own = split_of(table.folder[-1]) if table.folder else None
    inner = path[len(table.folder) :]
    below = split_of(inner[0]) if len(inner) > 1 else None
    return own or below or "train"


class _Index:
    """The pictures by their paths, and by their last parts where these are unique."""

    def __init__(self, pictures: Sequence[Path]) -> None:
        self._paths = set(pictures)
        self._last: dict[str, list[Path]] = defaultdict(list)
        for path in pictures:
            self._last[path[-1]].append(path)

    def find(self, folder: Path, file: str) -> Path | None:
        candidates = _candidates(folder, file)
        found = next((path for path in candidates if path in self._paths), None)
        if found or not candidates or len(candidates[-1]) > 1:
            return found
        same = [path for path in self._last[candidates[-1][0]] if path[: len(folder)] == folder]
        return same[0] if len(same) == 1 else None


def _candidates(folder: Path, file: str) -> tuple[Path, ...]:
    """Where a row may point: below its table's folder, or from the archive's root. Never out of the archive."""
    try:
        parts = parts_of(file.replace("\\", "/"))
    except BadRequest:
        return ()
    return ((*folder, *parts), parts) if parts else ()


def _bad(detail: str) -> BadRequest:
    return BadRequest(detail, code="bad_dataset")
