"""Labelled pictures as arrays: decoded once, cut once, kept as uint8 until they are on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.engine.images import Geometry, decode, fit


@dataclass(frozen=True)
class Pictures:
    """images: uint8 [n, S, S, 3]; targets: int64 [n], indices into the labels."""

    images: NDArray[np.uint8]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: NDArray[np.int64]) -> Pictures:
        return Pictures(self.images[index], self.targets[index])


@dataclass(frozen=True)
class Splits:
    train: Pictures
    val: Pictures
    test: Pictures | None


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
) -> Pictures:
    """Decode and cut every source. `on_picture` is called after each: a heartbeat, a progress bar, or a way out."""
    images = np.empty((len(sources), geometry.size, geometry.size, 3), np.uint8)
    for image, source in zip(images, sources, strict=True):
        image[...] = fit(decode(source.read(), max_pixels=max_pixels), geometry)
        if on_picture is not None:
            on_picture()
    return Pictures(images, np.array([source.target for source in sources], np.int64))


def hold_out(pictures: Pictures, share: float, seed: int) -> tuple[Pictures, Pictures]:
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
