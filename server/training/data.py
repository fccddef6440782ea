"""Labelled pictures for a fit, and their splits. The pixels come from an `Images`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.engine.images.decode import Geometry, decode, fit

from .augment import Views

Index = NDArray[np.int64]
Pixels = NDArray[np.uint8]


class Images(Protocol):
    """A sequence of pictures whose pixels are read on demand."""

    def __len__(self) -> int: ...

    def read(self, index: Index, views: Views | None = None) -> Pixels:
        """Pixels uint8 [k, S, S, 3] in the order of `index`: as the server cuts them, or picture i as view i."""
        ...

    def take(self, index: Index) -> Images:
        """The pictures `index`, in that order."""
        ...

    @property
    def digest(self) -> str | None:
        """A digest of the pixels that `read` returns without views; None where it is not known."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Cut pictures in one array, uint8 [n, S, S, 3]."""

    pixels: Pixels
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: Index, views: Views | None = None) -> Pixels:
        pixels = self.pixels[index]
        return pixels if views is None else views.applied(pixels)

    def take(self, index: Index) -> InMemory:
        return InMemory(self.pixels[index], None if self.digest is None else _part(self.digest, index))


def _part(digest: str, index: Index) -> str:
    return hashlib.sha256(digest.encode() + b"\0" + np.ascontiguousarray(index, "<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class LabelledImages:
    """targets: int64 [n], indices into the labels; `images` has the same length."""

    images: Images
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Index) -> LabelledImages:
        return LabelledImages(self.images.take(index), self.targets[index])


@dataclass(frozen=True)
class Splits:
    train: LabelledImages
    val: LabelledImages
    test: LabelledImages | None


@dataclass(frozen=True)
class Source:
    """One stored picture: a function that reads its bytes, and its label's index."""

    read: Callable[[], bytes]
    target: int


def read_pictures(
    sources: Sequence[Source],
    geometry: Geometry,
    *,
    max_pixels: int,
    on_picture: Callable[[], None] | None = None,
) -> LabelledImages:
    """Decode and cut every source. `on_picture` is called after each picture; what it raises ends the reading."""
    images = np.empty((len(sources), geometry.size, geometry.size, 3), np.uint8)
    for image, source in zip(images, sources, strict=True):
        image[...] = fit(decode(source.read(), max_pixels=max_pixels), geometry)
        if on_picture is not None:
            on_picture()
    return LabelledImages(InMemory(images), np.array([source.target for source in sources], np.int64))


def hold_out(pictures: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split off `share` of each class for validation: at least one picture, but never the last of a class. Returns the
    pictures for training and for validation."""
    generator = np.random.Generator(np.random.PCG64(seed))
    held: list[NDArray[np.int64]] = []
    for target in np.unique(pictures.targets):
        members = generator.permutation(np.flatnonzero(pictures.targets == target))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
    val = np.sort(np.concatenate(held))
    train = np.setdiff1d(np.arange(len(pictures)), val)
    return pictures.take(train), pictures.take(val)


def sample(pictures: LabelledImages, most: int, seed: int) -> LabelledImages:
    """About `most` of the pictures, with the same share of every class; all of them where they are fewer."""
    if len(pictures) <= most:
        return pictures
    return hold_out(pictures, most / len(pictures), seed)[1]
