"""Split and label of each picture, from the folders of all pictures:

[wrapper/ …] [train | val | test/ [wrapper/ …]] class/ … picture
[wrapper/ …] class/ train | val | test/ picture

A wrapper is a folder around everything, or around everything in a split (seg_train/seg_train/…). Where folders of the
same names repeat inside the outermost ones (fold1/cat, fold2/cat), nothing says which are the classes: refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from server.datasets.dataset import bad_dataset
from server.datasets.example import Place, Split
from server.datasets.label import label_of

from .member_names import printable
from .split_names import is_wrapper, split_of, splits_among

MemberPath = tuple[str, ...]  # in parts

MAX_SHOWN: Final = 4  # folders in a message
FEW: Final = 0.1  # of all pictures: so many may lie beside folders that hold the others

_NO_CLASS: Final = "not in a class folder"


def places(paths: Sequence[MemberPath]) -> list[Place]:
    """The place of each path: its split and label, or why it has none. Raises `BadRequest` bad_dataset."""
    paths = _unwrapped(paths)
    splits = _splits(paths)
    if splits:
        inner = _unwrapped_splits(paths, splits)
        _check_classes(rest for path, rest in zip(paths, inner, strict=True) if splits.get(path[0]))
        return [_place_in_split(path[0], rest, splits) for path, rest in zip(paths, inner, strict=True)]
    if _are_splits_in_classes(paths):
        return [(split_of(path[1]) or "train", label_of(path[0])) if len(path) > 1 else _NO_CLASS for path in paths]
    _check_classes(paths)
    return [_place("train", path) for path in paths]


def _place_in_split(top: str, rest: MemberPath, splits: Mapping[str, Split | None]) -> Place:
    if not rest or top not in splits:
        return "outside the split folders train, val and test"
    split = splits[top]
    return "in a folder without labels beside the split folders" if split is None else _place(split, rest)


def _place(split: Split, path: MemberPath) -> Place:
    return (split, label_of(path[0])) if len(path) > 1 else _NO_CLASS


def _tops(paths: Iterable[MemberPath], parts: int = 2) -> set[str]:
    """The outermost folders of the paths that have so many parts."""
    return {path[0] for path in paths if len(path) >= parts}


# --- wrappers ---------------------------------------------------------------------------------------------------------


def _unwrapped(paths: Sequence[MemberPath]) -> list[MemberPath]:
    """The paths without the folders around everything, if there are folders inside: all such folders down to classes
    or splits, else one."""
    outside = unwrapped = list(paths)
    while _has_wrapper(outside):
        inside = [path[1:] if len(path) > 1 else path for path in outside]
        tops = _tops(inside)
        if unwrapped == list(paths) or len(tops) > 1 or split_of(min(tops)):
            unwrapped = inside
        if not _are_in_folders([path[1:] for path in outside if len(path) > 1]):
            break  # a folder with pictures in it is a class
        outside = inside
    return unwrapped


def _are_in_folders(paths: Collection[MemberPath]) -> bool:
    """Whether all pictures, or all but a few, lie in folders."""
    return sum(len(path) == 1 for path in paths) <= FEW * len(paths)


def _has_wrapper(paths: Sequence[MemberPath]) -> bool:
    """Whether all paths share a top folder with folders in it, and it is no split, or is around splits."""
    tops = _tops(paths)
    inside = _tops([path[1:] for path in paths])
    if len(tops) != 1 or not inside:
        return False
    return split_of(min(tops)) is None or splits_among(_tops([path[1:] for path in paths], 3)).keys() == inside


def _unwrapped_splits(paths: Sequence[MemberPath], splits: Mapping[str, Split | None]) -> list[MemberPath]:
    """The paths without their split, and without the folders around everything in it."""
    by_split: dict[str, list[MemberPath]] = defaultdict(list)
    for path in paths:
        by_split[path[0]].append(path[1:])
    while wrapped := [top for top in splits if _is_wrapped(top, by_split, splits)]:
        for top in wrapped:
            by_split[top] = [path[1:] if len(path) > 1 else path for path in by_split[top]]
    following = {top: iter(rest) for top, rest in by_split.items()}
    return [next(following[path[0]]) for path in paths]


def _is_wrapped(top: str, by_split: Mapping[str, Sequence[MemberPath]], splits: Mapping[str, Split | None]) -> bool:
    """Whether a split holds one folder, which is its name again, or a word like images, or all folders are in it."""
    tops = {other: _tops(by_split[other]) for other in splits}
    if len(tops[top]) != 1:
        return False
    [name] = tops[top]
    names = splits_among(set().union(*tops.values(), splits))
    if name.casefold() == top.casefold() or is_wrapper(name) or (name in names and names[name] == splits[top]):
        return True
    classes = set().union(*(inner for inner in tops.values() if len(inner) > 1))
    nested = [path[1:] for path in by_split[top] if len(path) > 1]
    return name not in classes and len(_tops(nested)) > 1 and _are_in_folders(nested)


# --- splits and classes -----------------------------------------------------------------------------------------------


def _splits(paths: Sequence[MemberPath]) -> dict[str, Split | None]:
    """The top folders that are splits. A `valid` folder with pictures directly in it is a class, unless all folders
    are splits."""
    tops = _tops(paths)
    splits = splits_among(tops)
    are_all = splits.keys() == tops and len(set(splits.values())) > 1
    return splits if are_all or any(splits_among(_tops(paths, 3)).values()) else {}


def _are_splits_in_classes(paths: Sequence[MemberPath]) -> bool:
    """Whether each class folder has its own splits: cat/train/1.jpg, cat/test/2.jpg."""
    nested = [path for path in paths if len(path) > 1]
    return bool(nested) and all(len(path) == 3 and split_of(path[1]) for path in nested)


def _check_classes(paths: Iterable[MemberPath]) -> None:
    """Raise `BadRequest` bad_dataset where the same folders repeat inside those that would be the classes."""
    nested = [path for path in paths if len(path) > 1]
    inside: dict[str, set[str]] = defaultdict(set)
    for path in nested:
        if len(path) > 2:
            inside[path[0]].add(path[1])
    if not _are_in_folders([path[1:] for path in nested]):
        return
    times = Counter(name for names in inside.values() for name in names)
    repeated = [name for name, count in times.items() if count > 1]
    inner, outer = _names(repeated), _names(inside)
    if repeated and any(len(path) > 3 for path in nested) and all(split_of(name) for name in repeated):
        raise bad_dataset(f"found the split folders {inner} inside each of {outer}: expected one set; send one of them")
    if len(repeated) > 1 and 2 * len(repeated) >= len(times):
        raise bad_dataset(
            f"found the folders {inner} inside each of {outer}, so either may be the classes. Expected class folders "
            f"outermost, or in train, val and test. If the classes are {inner}: join the folders of the same name, or "
            f"send one of {outer}. If they are {outer}: put the pictures directly into them. Or add a table labels.csv "
            "with the columns file and label"
        )


def _names(names: Collection[str]) -> str:
    shown = ", ".join(repr(printable(name, 40)) for name in sorted(names)[:MAX_SHOWN])
    return shown + (", …" if len(names) > MAX_SHOWN else "")
