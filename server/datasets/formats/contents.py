"""The members of an upload of any format: files of an archive, rows of a parquet file, slices of arrays.

zip, tar, tar.gz, … ── members ──┬── *.parquet ── rows ──┐
parquet ─────────────────────────┴───────────────────────┼──► Member: a name, bytes, and its place if known
npz ────────────────────────────────────────── slices ───┘    or Skipped, with the reason
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from server.datasets.dataset import bad_dataset
from server.datasets.example import Skipped

from .archive import BLOCK, Limits, Member, members, sniff
from .metering import MAX_READ_BYTES, Meter
from .npz_members import is_npz, npz_members
from .parquet_members import ROWS, parquet_members
from .parquet_pages import MAGIC


def contents(
    file: BinaryIO, limits: Limits, scratch: Path, label_column: str | None = None
) -> Iterator[Member | Skipped]:
    """The members of the upload. `scratch` is a folder for files that cannot be read in one pass; `label_column` the
    labels' column of a parquet file.

    Raises `BadRequest`: bad_archive for damaged or hostile input, bad_dataset where there are no labelled pictures.
    """
    head = file.read(BLOCK)
    rows = Meter("the upload", file.seek(0, os.SEEK_END), limits)
    if head.startswith(MAGIC):
        yield from parquet_members(file, ROWS, limits, rows, label_column)
    elif sniff(head) == "zip" and is_npz(file, limits):
        if label_column is not None:
            raise bad_dataset(f"expected a table or a parquet file with the column {label_column!r}, found an npz")
        yield from npz_members(file, limits, scratch)
    else:
        for member in members(file, limits):
            if member.path[-1].lower().endswith(".parquet"):
                yield from _rows(member, limits, scratch, rows, label_column)
            else:
                yield member


def _rows(
    member: Member, limits: Limits, scratch: Path, total: Meter, label_column: str | None
) -> Iterator[Member | Skipped]:
    """The rows of a parquet file inside an archive. Its index is at its end, so all of it is copied to disk first."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        while piece := member.take(MAX_READ_BYTES):
            file.write(piece)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            yield Skipped(member.name, "no parquet file, although its name ends so")
        else:
            yield from parquet_members(file, member.path, limits, total, label_column)
