"""The columns of a table of labels by their customary names, explicit ones first: file before id, label before breed.

Where a table has two columns and one of them is known, the other one is what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from server.errors import BadRequest

from .member_names import printable

FILE_COLUMNS: Final = ("file", "file_name", "filename", "path", "image")
OTHER_FILE_COLUMNS: Final = (
    "file_path", "filepath", "file_id", "fname", "id", "image_file", "image_filename", "image_id", "image_name",
    "image_path", "images", "img", "img_id", "img_name", "img_path", "name", "photo", "picture",
)  # fmt: skip
LABEL_COLUMNS: Final = ("label", "class")
OTHER_LABEL_COLUMNS: Final = (
    "breed", "category", "class_name", "classes", "classname", "diagnosis", "dx", "label_name", "labels", "species",
    "target", "variety",
)  # fmt: skip
MAX_SHOWN: Final = 20  # columns in a message

_ROW_NUMBERS: Final = re.compile(r"(unnamed: ?\d+|)", re.IGNORECASE)  # a column that pandas adds


def columns_of_table(table: str, header: Sequence[str], label_column: str | None = None) -> tuple[str, str, str | None]:
    """The names of the columns of file, label and, if there is one, split; `label_column` is the label's where given.

    Raises `BadRequest` bad_dataset that says what was expected and what was found.
    """
    split = [column for column in header if column.casefold() == "split"]
    if len(split) > 1:
        raise _bad(f"{table}: expected at most one column called split, found {len(split)}")
    rest = [column for column in header if column not in split and not _ROW_NUMBERS.fullmatch(column)]
    label = _single(table, [label_column], rest) if label_column else None
    file = _known(table, FILE_COLUMNS, OTHER_FILE_COLUMNS, [column for column in rest if column != label])
    label = label or _known(table, LABEL_COLUMNS, OTHER_LABEL_COLUMNS, [column for column in rest if column != file])
    other = [column for column in rest if column not in (file, label)] if len(rest) == 2 and (file or label) else []
    file, label = file or "".join(other) or None, label or "".join(other) or None
    if file is None or label is None:
        raise _missing(table, FILE_COLUMNS if file is None else LABEL_COLUMNS, header)
    return file, label, split[0] if split else None


def _known(table: str, explicit: Sequence[str], customary: Sequence[str], header: Sequence[str]) -> str | None:
    """The column with an explicit name, else the only one with a customary name. Raises where explicit names repeat."""
    if any(column.casefold() in explicit for column in header):
        return _single(table, explicit, header)
    matching = [column for column in header if re.sub("[ -]", "_", column.casefold()) in customary]
    return matching[0] if len(matching) == 1 else None


def _single(table: str, expected: Sequence[str], header: Sequence[str]) -> str:
    matching = [column for column in header if column in expected or column.casefold() in expected]
    if len(matching) != 1:
        raise _missing(table, expected, matching or header)
    return matching[0]


def _missing(table: str, expected: Sequence[str], found: Sequence[str]) -> BadRequest:
    names = ", ".join(repr(printable(column, 40)) for column in found[:MAX_SHOWN]) or "none"
    wanted = " or ".join(printable(name, 40) for name in expected)
    return _bad(f"{table}: expected exactly one column called {wanted}, found: {names}")


def _bad(detail: str) -> BadRequest:
    return BadRequest(detail, code="bad_dataset")
