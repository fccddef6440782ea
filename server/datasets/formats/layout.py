"""Split and label of each picture, from the folders of all pictures:

[wrapper/] [train | val | test/] class/ … picture
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

from server.datasets.dataset import bad_dataset
from server.datasets.example import Place, Split

MemberPath = tuple[str, ...]  # in parts

MAX_LABEL: Final = 200
ALIASES: Final[dict[str, Split]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def places(paths: Sequence[MemberPath]) -> list[Place]:
    """The place of each path: its split and label, or why it has none. Raises `BadRequest` bad_dataset."""
    inner = _unwrapped(paths)
    place_of = _place_in_split if any(_is_split(path) for path in inner) else _place_in_class
    return [place_of(path) for path in inner]


def split_of(folder: str) -> Split | None:
    return ALIASES.get(folder.strip().casefold())


def label_of(folder: str) -> str:
    """The folder's name as a label: one printable line. Raises `BadRequest` bad_dataset."""
    clean = "".join(letter if letter.isprintable() else " " for letter in unicodedata.normalize("NFC", folder))
    label = " ".join(clean.split())
    if not label:
        raise bad_dataset("a class has a name without any letter")
    if len(label) > MAX_LABEL:
        raise bad_dataset(f"class {label[:40]!r}… has {len(label)} characters; at most {MAX_LABEL} are allowed")
    return label


def _unwrapped(paths: Sequence[MemberPath]) -> list[MemberPath]:
    """The paths without their common top folder, if they have one and it is no split."""
    nested = [path for path in paths if len(path) > 1]
    tops = {path[0] for path in nested}
    deep = [path[1:] for path in nested if len(path) > 2]
    if len(tops) != 1 or not deep:
        return list(paths)
    if split_of(next(iter(tops))) and not all(_is_split(path) for path in deep):
        return list(paths)
    return [path[1:] if len(path) > 1 else path for path in paths]


def _is_split(path: MemberPath) -> bool:
    """Whether the path begins with a split folder. A `valid` folder with pictures directly in it is a class."""
    return len(path) > 2 and split_of(path[0]) is not None


def _place_in_split(path: MemberPath) -> Place:
    split = split_of(path[0])
    if len(path) == 1 or split is None:
        return "outside the split folders train, val and test"
    return (split, label_of(path[1])) if len(path) > 2 else "not in a class folder"


def _place_in_class(path: MemberPath) -> Place:
    return ("train", label_of(path[0])) if len(path) > 1 else "not in a class folder"
