"""What is in an upload, whatever it is: the files of an archive, the rows of a table file, the slices of arrays.

zip, tar, tar.gz, tar.zst ── members ──┬── *.parquet ── rows ──┐
parquet ───────────────────────────────┴───────────────────────┼──► Member: a name, bytes, perhaps its place
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
from .metering import MAX_READ_BYTES, Meter, refused
from .npz_members import is_npz, npz_members
from .parquet_members import parquet_members
from .parquet_pages import MAGIC


def contents(file: BinaryIO, limits: Limits, scratch: Path) -> Iterator[Member | Skipped]:
    """`scratch` is a folder for what must be read out of order.

    Raises `BadRequest`: bad_archive for what is damaged or hostile, bad_dataset where no labelled pictures are.
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
    """A table file inside an archive: its end says what it holds, so it has to lie on the disk as a whole."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        while piece := member.take(MAX_READ_BYTES):
            file.write(piece)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            raise refused(f"the archive's member {member.name!r} is no parquet file, whatever its name says")
        yield from parquet_members(file, member.path, limits, total)
