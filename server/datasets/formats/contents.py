"""The members of an upload of any format: files of an archive, rows of a parquet file, slices of arrays.

zip, tar, tar.gz, tar.zst ── members ──┬── *.parquet ── rows ──┐
parquet ───────────────────────────────┴───────────────────────┼──► Member: a name, bytes, and its place if known
npz ──────────────────────────────────────────────── slices ───┘    or Skipped, with the reason
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from server.datasets.example import Skipped

from .archive import BLOCK, Limits, Member, members, sniff
from .metering import MAX_READ_BYTES, Meter, bad_archive
from .npz_members import is_npz, npz_members
from .parquet_members import parquet_members
from .parquet_pages import MAGIC


def contents(file: BinaryIO, limits: Limits, scratch: Path) -> Iterator[Member | Skipped]:
    """The members of the upload. `scratch` is a folder for files that cannot be read in one pass.

    Raises `BadRequest`: bad_archive for damaged or hostile input, bad_dataset where there are no labelled pictures.
    """
    head = file.read(BLOCK)
    rows = Meter("the upload", file.seek(0, os.SEEK_END), limits)
    if head.startswith(MAGIC):
        yield from parquet_members(file, ("rows",), limits, rows)
    elif sniff(head) == "zip" and is_npz(file, limits):
        yield from npz_members(file, limits)
    else:
        for member in members(file, limits):
            if member.path[-1].lower().endswith(".parquet"):
                yield from _rows(member, limits, scratch, rows)
            else:
                yield member


def _rows(member: Member, limits: Limits, scratch: Path, total: Meter) -> Iterator[Member | Skipped]:
    """The rows of a parquet file inside an archive. Its index is at its end, so all of it is copied to disk first."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        while piece := member.take(MAX_READ_BYTES):
            file.write(piece)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            raise bad_archive(f"the archive's member {member.name!r} is no parquet file, although its name ends so")
        yield from parquet_members(file, member.path, limits, total)
