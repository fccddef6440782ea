"""The pictures of a NumPy archive of the MedMNIST kind, as PNG files, one at a time.

    train_images, val_images, test_images    uint8 [n, h, w] or [n, h, w, 3]
    train_labels, val_labels, test_labels    integers [n] or [n, 1]
    class_names                              text [C], optional; without it the labels are "0", "1", …

An npz is a zip, read like any other; an array's header is believed only where it agrees with the size of its member.
Nothing is unpickled: an array of Python objects is refused.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from server.datasets.dataset import bad
from server.datasets.example import SPLITS, Skipped, Split

from .layout import label_of, split_of
from .member_names import Names, shown
from .metering import Limits, Member, refused, refusing
from .png import png
from .zip_members import zip_members

MAX_HEADER_BYTES: Final = 10_000  # of an array, which NumPy itself takes no longer either
MAX_PICTURE_BYTES: Final = 64 * 2**20
MAX_SIDE: Final = 32_768
MAX_NAMES_BYTES: Final = 8 * 2**20
NAME_ARRAYS: Final = ("class_names", "label_names", "classes", "labels")

_MAGIC: Final = b"\x93NUMPY"
_UNREADABLE: Final = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError, LookupError)


@dataclass(frozen=True, slots=True)
class _Array:
    """What an array's header says. `content` is there of labels and names, which are small."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    content: bytes = b""

    def __str__(self) -> str:
        return f"{shown(self.name, 60)} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class _Labelled:
    split: Split
    images: _Array
    labels: list[int]


def is_npz(file: BinaryIO, limits: Limits) -> bool:
    """Whether a zip holds arrays in its root and nothing else."""
    empty = True
    for member in zip_members(file, limits, Names(limits.max_members)):
        if not _is_array(member.path):
            return False
        empty = False
    return not empty


def _is_array(path: tuple[str, ...]) -> bool:
    return len(path) == 1 and path[0].endswith(".npy")


def npz_members(file: BinaryIO, limits: Limits) -> Iterator[Member | Skipped]:
    """The pictures with their places, and what the other arrays were. Labels first, whatever the order in the zip."""
    arrays = {member.path[0]: _read(member, limits) for member in zip_members(file, limits, Names(limits.max_members))}
    pairs = {each.images.name: each for each in _paired(arrays)}
    names = _class_names(arrays)
    used = {*pairs, *(f"{split}_labels" for split in _by_split(arrays, "labels").values()), *NAME_ARRAYS}
    for member in zip_members(file, limits, Names(limits.max_members)):
        name = member.path[0].removesuffix(".npy")
        if name in pairs:
            yield from _pictures(member, pairs[name], names)
        elif name not in used:
            yield Skipped(member.name, "an array that is neither images nor labels")


# --- headers ----------------------------------------------------------------------------------------------------------


def _read(member: Member, limits: Limits) -> _Array:
    """An array's header, and its content where that is needed as a whole."""
    name = member.path[0].removesuffix(".npy")
    (shape, fortran, dtype), start = _header(member)
    if dtype.hasobject:
        raise refused(f"array {shown(name, 60)!r} holds Python objects (pickle), which are never read")
    array = _Array(name, shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    if start + size != member.size:
        raise refused(f"array {array} takes {size:,} bytes, and its member has {member.size - start:,} for it")
    if fortran and min(shape, default=0) > 1 and len(shape) > 1:
        raise bad(f"array {array} is in Fortran order; expected C order")
    small = MAX_NAMES_BYTES if name in NAME_ARRAYS else 8 * limits.max_members
    if not name.endswith("_labels") and name not in NAME_ARRAYS:
        return array
    if size > small:
        raise refused(f"array {array} has {size:,} bytes; at most {small:,} are allowed")
    return _Array(name, shape, dtype, member.take(size))


def _header(member: Member) -> tuple[tuple[tuple[int, ...], bool, np.dtype[Any]], int]:
    """Shape, order and dtype; and how many bytes that took. NumPy would read as much as a header claims to have."""
    what = f"array {shown(member.name, 60)!r}"
    head = member.take(8)
    version = head[6:]
    if head[:6] != _MAGIC or version not in (b"\x01\x00", b"\x02\x00"):
        raise refused(f"{what} is no NumPy array of format 1 or 2: it begins with {head.hex(' ') or 'nothing'}")
    length = member.take(2 if version[0] == 1 else 4)
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES:
        raise refused(f"{what} has a header of {size:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    text = io.BytesIO(length + member.take(size))
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    try:
        return read(text, max_header_size=MAX_HEADER_BYTES), 8 + len(length) + size
    except _UNREADABLE as error:
        raise refused(f"{what} has a header that cannot be read ({type(error).__name__})") from error


# --- labels -----------------------------------------------------------------------------------------------------------


def _paired(arrays: Mapping[str, _Array]) -> list[_Labelled]:
    """The splits that have images, each with as many labels."""
    images, labels = _by_split(arrays, "images"), _by_split(arrays, "labels")
    if not images or images.keys() != labels.keys():
        expected = "train_images and train_labels, and the same of val and test where there are any"
        found = ", ".join(str(array) for array in list(arrays.values())[:20])
        raise bad(f"expected arrays called {expected}; found: {found}")
    by_name = {array.name: array for array in arrays.values()}
    found_in = [(split, by_name[f"{images[split]}_images"], by_name[f"{labels[split]}_labels"]) for split in images]
    return [_Labelled(split, _checked(pictures), _labels(pictures, given)) for split, pictures, given in found_in]


def _by_split(arrays: Mapping[str, _Array], what: str) -> dict[Split, str]:
    """split → how the arrays' names begin: train, training, …"""
    found: dict[Split, str] = {}
    for array in arrays.values():
        prefix, _, rest = array.name.rpartition("_")
        split = split_of(prefix) if rest == what else None
        if split is not None and found.setdefault(split, prefix) != prefix:
            raise bad(f"expected one array of {split} {what}, found {found[split]}_{what} and {array.name}")
    return {split: found[split] for split in SPLITS if split in found}


def _checked(images: _Array) -> _Array:
    dims = images.shape[1:]
    if images.dtype != np.uint8 or not (len(dims) == 2 or (len(dims) == 3 and dims[2] in (1, 3))):
        raise bad(f"expected images as uint8 [n, h, w] or [n, h, w, 3], found {images}")
    if not all(1 <= side <= MAX_SIDE for side in dims) or math.prod(dims) > MAX_PICTURE_BYTES:
        raise bad(f"expected sides of 1 to {MAX_SIDE:,} and at most {MAX_PICTURE_BYTES:,} bytes a picture: {images}")
    return images


def _labels(images: _Array, labels: _Array) -> list[int]:
    if len(labels.shape) == 2 and labels.shape[1] > 1:
        raise bad(f"expected one label a picture, found several (multi-label): {labels}")
    if labels.dtype.kind not in "iub" or labels.shape not in ((images.shape[0],), (images.shape[0], 1)):
        raise bad(f"expected an integer for each of the {images.shape[0]:,} pictures of {images}, found {labels}")
    found: list[int] = np.frombuffer(labels.content, labels.dtype).astype(object).tolist()
    return [int(label) for label in found]


def _class_names(arrays: Mapping[str, _Array]) -> list[str]:
    """Empty where the archive has none."""
    given = [array for array in arrays.values() if array.name in NAME_ARRAYS]
    if not given:
        return []
    if len(given) > 1 or given[0].dtype.kind not in "US" or len(given[0].shape) != 1:
        raise bad(f"expected one array of class names, text [C], found {', '.join(map(str, given))}")
    with refusing():
        names = np.frombuffer(given[0].content, given[0].dtype).tolist()
        return [label_of(name if isinstance(name, str) else name.decode()) for name in names]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(member: Member, given: _Labelled, names: list[str]) -> Iterator[Member]:
    _header(member)
    height, width, *channels = given.images.shape[1:]
    shape = (height, width, channels[0] if channels else 1)
    for number, label in enumerate(given.labels):
        data = png(_pixels(member, shape))
        place = given.split, _named(label, names)
        yield Member((given.images.name, f"{number}.png"), len(data), io.BytesIO(data), place)


def _pixels(member: Member, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    data = member.take(math.prod(shape))
    if len(data) < math.prod(shape):
        raise refused("the archive is damaged or truncated: an array ends too early")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _named(label: int, names: list[str]) -> str:
    if names and not 0 <= label < len(names):
        raise bad(f"expected labels from 0 to {len(names) - 1}, for which there are names; found {label}")
    return names[label] if names else str(label)
