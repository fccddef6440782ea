"""One labelled picture of a dataset, and one file of an upload that was left out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

Split = Literal["train", "val", "test"]
Place = tuple[Split, str] | str  # split and label, or why a picture has none

SPLITS: Final[tuple[Split, ...]] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image. `name` is its path in the archive it came in, `sha256` the digest of its `bytes` bytes.
    `format` (jpeg, png, webp, bmp) and `mode` (Pillow's: RGB, L, …) are empty where they are unknown."""

    split: Split
    label: str
    name: str
    sha256: str
    bytes: int
    width: int
    height: int
    format: str = ""
    mode: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file of an upload that is not part of the dataset, and why."""

    name: str
    reason: str


def natural(text: str) -> tuple[tuple[str | int, ...], str]:
    """A sort key that puts 2 before 10."""
    parts = re.split("([0-9]+)", text)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), text
