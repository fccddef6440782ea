"""What is in an upload, whatever it is: the files of an archive, the rows of a table file, the slices of arrays.

zip, tar, tar.gz, tar.zst ── members ──┬── *.parquet ── rows ──┐
parquet ───────────────────────────────┴───────────────────────┼──► Member: a name, bytes, perhaps its place
npz ──────────────────────────────────────────────── slices ───┘    or Skipped, with the reason
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from server.datasets.archive import BLOCK, Limits, Member, members, sniff
from server.datasets.example import Skipped
from server.datasets.npz_members import is_npz, npz_members


def contents(file: BinaryIO, limits: Limits) -> Iterator[Member | Skipped]:
    """Raises `BadRequest`: bad_archive for what is damaged or hostile, bad_dataset where no labelled pictures are."""
    head = file.read(BLOCK)
    if sniff(head) == "zip" and is_npz(file, limits):
        yield from npz_members(file, limits)
    else:
        yield from members(file, limits)
