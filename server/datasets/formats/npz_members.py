"""The pictures of a NumPy archive in the layout of MedMNIST, as PNG files, one at a time.

    train_images, val_images, test_images    uint8 [n, h, w] or [n, h, w, 3]
    train_labels, val_labels, test_labels    integers [n] or [n, 1]
    class_names                              text [C], optional; without it the labels are "0", "1", …

An npz is a zip, read like any other; an array's header must agree with the size of its member. Nothing is unpickled: an
array of Python objects is refused.
"""

from __future__ import annotations

import io
import math
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from server.datasets.dataset import bad_dataset
from server.datasets.example import SPLITS, Skipped, Split
from server.datasets.label import label_of

from .member_names import Names, printable
from .metering import MAX_READ_BYTES, Limits, Member, bad_archive, refuse_damage
from .png import png
from .split_names import split_of
from .zip_members import zip_members

MAX_HEADER_BYTES: Final = 10_000  # of an array's header; NumPy's own limit
MAX_PICTURE_BYTES: Final = 64 * 2**20
MAX_SIDE: Final = 32_768
MAX_NAMES_BYTES: Final = 8 * 2**20
NAME_ARRAYS: Final = ("class_names", "label_names", "classes", "labels")

_MAGIC: Final = b"\x93NUMPY"
_UNREADABLE: Final = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError, LookupError)


@dataclass(frozen=True, slots=True)
class _Array:
    """An array's header. `content` is read for labels and class names only, which are small."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    content: bytes = b""

    def __str__(self) -> str:
        return f"{printable(self.name, 60)} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class _Labelled:
    split: Split
    images: _Array
    labels: list[int]


def is_npz(file: BinaryIO, limits: Limits) -> bool:
    """Whether a zip contains arrays in its root and nothing else."""
    empty = True
    for member in zip_members(file, limits, Names(limits.max_members)):
        if not _is_array(member.path):
            return False
        empty = False
    return not empty


def _is_array(path: tuple[str, ...]) -> bool:
    return len(path) == 1 and path[0].endswith(".npy")


def npz_members(file: BinaryIO, limits: Limits, scratch: Path) -> Iterator[Member | Skipped]:
    """The pictures with their places; other arrays are skipped. Labels are read first, whatever their order in the zip.
    `scratch` is a folder for arrays in Fortran order, whose pictures are not in one piece.

    Raises `BadRequest` bad_archive or bad_dataset.
    """
    arrays = {member.path[0]: _read(member, limits) for member in zip_members(file, limits, Names(limits.max_members))}
    pairs = {p.images.name: p for p in _pair_splits(arrays)}
    names = _class_names(arrays)
    used = {*pairs, *(f"{split}_labels" for split in _by_split(arrays, "labels").values()), *NAME_ARRAYS}
    for member in zip_members(file, limits, Names(limits.max_members)):
        name = member.path[0].removesuffix(".npy")
        if name in pairs:
            yield from _pictures(member, pairs[name], names, scratch)
        elif name not in used:
            yield Skipped(member.name, "an array that is neither images nor labels")


# --- headers ----------------------------------------------------------------------------------------------------------


def _read(member: Member, limits: Limits) -> _Array:
    """An array's header, with its content if it holds labels or class names."""
    name = member.path[0].removesuffix(".npy")
    (shape, _, dtype), start = _header(member)
    if dtype.hasobject:
        raise bad_archive(f"array {printable(name, 60)!r} holds Python objects (pickle), which are never read")
    array = _Array(name, shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    if start + size != member.size:
        raise bad_archive(f"array {array} takes {size:,} bytes, but its member has {member.size - start:,}")
    small = MAX_NAMES_BYTES if name in NAME_ARRAYS else 8 * limits.max_members
    if not name.endswith("_labels") and name not in NAME_ARRAYS:
        return array
    if size > small:
        raise bad_archive(f"array {array} has {size:,} bytes; at most {small:,} are allowed")
    return _Array(name, shape, dtype, member.take(size))


def _header(member: Member) -> tuple[tuple[tuple[int, ...], bool, np.dtype[Any]], int]:
    """(shape, Fortran order, dtype) and the header's size in bytes. The size is checked here since NumPy would read
    whatever a header claims."""
    subject = f"array {printable(member.name, 60)!r}"
    head = member.take(8)
    version = head[6:]
    if head[:6] != _MAGIC or version not in (b"\x01\x00", b"\x02\x00"):
        raise bad_archive(f"{subject} is no NumPy array of format 1 or 2: it begins with {head.hex(' ') or 'nothing'}")
    length = member.take(2 if version[0] == 1 else 4)
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES:
        raise bad_archive(f"{subject} has a header of {size:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    text = io.BytesIO(length + member.take(size))
    parse = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    try:
        return parse(text, max_header_size=MAX_HEADER_BYTES), 8 + len(length) + size
    except _UNREADABLE as error:
        raise bad_archive(f"{subject} has a header that cannot be read ({type(error).__name__})") from error


# --- labels -----------------------------------------------------------------------------------------------------------


def _pair_splits(arrays: Mapping[str, _Array]) -> list[_Labelled]:
    """Images and labels of each split. Raises `BadRequest` bad_dataset unless each split has as many of both."""
    images, labels = _by_split(arrays, "images"), _by_split(arrays, "labels")
    if not images or images.keys() != labels.keys():
        expected = "train_images and train_labels, and likewise for val and test if there are any"
        names = ", ".join(str(array) for array in list(arrays.values())[:20])
        raise bad_dataset(f"expected arrays called {expected}; found: {names}")
    by_name = {array.name: array for array in arrays.values()}
    arrays_of = [(split, by_name[f"{images[split]}_images"], by_name[f"{labels[split]}_labels"]) for split in images]
    return [
        _Labelled(split, _check_images(pictures), _labels(pictures, numbers)) for split, pictures, numbers in arrays_of
    ]


def _by_split(arrays: Mapping[str, _Array], content: str) -> dict[Split, str]:
    """split → the prefix of its arrays' names: train, training, …"""
    prefixes: dict[Split, str] = {}
    for array in arrays.values():
        prefix, _, rest = array.name.rpartition("_")
        split = split_of(prefix) if rest == content else None
        if split is not None and prefixes.setdefault(split, prefix) != prefix:
            raise bad_dataset(
                f"expected one array of {split} {content}, found {prefixes[split]}_{content} and {array.name}"
            )
    return {split: prefixes[split] for split in SPLITS if split in prefixes}


def _check_images(images: _Array) -> _Array:
    dims = images.shape[1:]
    if images.dtype != np.uint8 or not (len(dims) == 2 or (len(dims) == 3 and dims[2] in (1, 3))):
        raise bad_dataset(f"expected images as uint8 [n, h, w] or [n, h, w, 3], found {images}")
    if not all(1 <= side <= MAX_SIDE for side in dims) or math.prod(dims) > MAX_PICTURE_BYTES:
        allowed = f"sides of 1 to {MAX_SIDE:,} and at most {MAX_PICTURE_BYTES:,} bytes a picture"
        raise bad_dataset(f"expected {allowed}: {images}")
    return images


def _labels(images: _Array, labels: _Array) -> list[int]:
    if len(labels.shape) == 2 and labels.shape[1] > 1:
        raise bad_dataset(f"expected one label a picture, found several (multi-label): {labels}")
    if labels.dtype.kind not in "iub" or labels.shape not in ((images.shape[0],), (images.shape[0], 1)):
        expected = f"an integer for each of the {images.shape[0]:,} pictures of {images}"
        raise bad_dataset(f"expected {expected}, found {labels}")
    numbers: list[int] = np.frombuffer(labels.content, labels.dtype).astype(object).tolist()
    return [int(label) for label in numbers]


def _class_names(arrays: Mapping[str, _Array]) -> list[str]:
    """The labels' names by number; empty where the archive has none."""
    candidates = [array for array in arrays.values() if array.name in NAME_ARRAYS]
    if not candidates:
        return []
    if len(candidates) > 1 or candidates[0].dtype.kind not in "US" or len(candidates[0].shape) != 1:
        raise bad_dataset(f"expected one array of class names, text [C], found {', '.join(map(str, candidates))}")
    with refuse_damage():
        names = np.frombuffer(candidates[0].content, candidates[0].dtype).tolist()
        return [label_of(name if isinstance(name, str) else name.decode()) for name in names]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(member: Member, labelled: _Labelled, names: list[str], scratch: Path) -> Iterator[Member]:
    (shape, fortran, _), _ = _header(member)
    height, width, *channels = shape[1:]
    arrays = _fortran_arrays(member, shape, scratch) if fortran else _c_arrays(member, shape)
    for number, (pixels, label) in enumerate(zip(arrays, labelled.labels, strict=True)):
        data = png(pixels.reshape(height, width, channels[0] if channels else 1))
        place = labelled.split, _class_name(label, names)
        yield Member((labelled.images.name, f"{number}.png"), len(data), io.BytesIO(data), place)


def _c_arrays(member: Member, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.uint8]]:
    for _ in range(shape[0]):
        yield np.frombuffer(_taken(member, math.prod(shape[1:])), np.uint8)


def _fortran_arrays(member: Member, shape: tuple[int, ...], scratch: Path) -> Iterator[npt.NDArray[np.uint8]]:
    with tempfile.TemporaryFile(dir=scratch) as file:
        left = math.prod(shape)
        while left:
            left -= file.write(_taken(member, min(left, MAX_READ_BYTES)))
        file.flush()
        yield from np.memmap(file, np.uint8, "r", shape=shape, order="F") if shape[0] else ()


def _taken(member: Member, size: int) -> bytes:
    data = member.take(size)
    if len(data) < size:
        raise bad_archive("the archive is damaged or truncated: an array ends too early")
    return data


def _class_name(label: int, names: list[str]) -> str:
    if names and not 0 <= label < len(names):
        raise bad_dataset(f"expected labels from 0 to {len(names) - 1}, which have names; found {label}")
    return names[label] if names else str(label)
