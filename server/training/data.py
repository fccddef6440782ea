"""Labelled pictures for a fit, and how they are split. Where their pixels come from is an `Images`' affair."""

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
    """The pixels of a number of pictures, read when they are wanted."""

    def __len__(self) -> int: ...

    def read(self, index: Index, views: Views | None = None) -> Pixels:
        """uint8 [k, S, S, 3] in the order of `index`: cut as the server cuts them, or as row i of `views` says."""
        ...

    def take(self, index: Index) -> Images: ...

    @property
    def digest(self) -> str | None:
        """Names the pixels that `read` gives without views; None where nobody has worked one out."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Pictures that lie cut and ready in one array, uint8 [n, S, S, 3]."""

    pixels: Pixels
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: Index, views: Views | None = None) -> Pixels:
        found = self.pixels[index]
        return found if views is None else views.applied(found)

    def take(self, index: Index) -> InMemory:
        return InMemory(self.pixels[index], None if self.digest is None else _part(self.digest, index))


def _part(digest: str, index: Index) -> str:
    return hashlib.sha256(digest.encode() + b"\0" + np.ascontiguousarray(index, "<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class LabelledImages:
    """targets: int64 [n], indices into the labels; `images` has the same n."""

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
    """One stored picture: how to get its bytes, and its label's index."""

    read: Callable[[], bytes]
    target: int


def read_pictures(
    sources: Sequence[Source],
    geometry: Geometry,
    *,
    max_pixels: int,
    on_picture: Callable[[], None] | None = None,
) -> LabelledImages:
    """Decode and cut every source. `on_picture` is called after each: a heartbeat, a progress bar, or a way out."""
    images = np.empty((len(sources), geometry.size, geometry.size, 3), np.uint8)
    for image, source in zip(images, sources, strict=True):
        image[...] = fit(decode(source.read(), max_pixels=max_pixels), geometry)
        if on_picture is not None:
            on_picture()
    return LabelledImages(InMemory(images), np.array([source.target for source in sources], np.int64))


def hold_out(pictures: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split off `share` of each class for validation, at least one picture and never a class's last one."""
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
    """About `most` of the pictures, of each class its share; all of them where they are no more."""
    if len(pictures) <= most:
        return pictures
    return hold_out(pictures, most / len(pictures), seed)[1]
