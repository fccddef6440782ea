"""The pictures of a dataset as a fit reads them: decoded when they are wanted, a few at a time, each once.

    sha256 ─► pixel cache ─ there? ──────────────────────────────► crop, mirror ─► its row of the batch
                 └─ no ─► blob ─decode─► picture ─cut─► pixels ─┘   └─► kept, if the dataset's share allows

Memory is bounded whatever the dataset's size: 32 bytes a picture, one full-size picture a thread, the batch, and the
cache's own part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.engine.images.decode import Geometry, decode

from .augment import Views
from .caches.pixel_cache import PixelCache
from .cut import Cut, crop_at
from .data import Index, Pixels

_FILLED: Final = 0.9  # of the cache by one dataset: shards fill unevenly


@dataclass(frozen=True)
class Decoder:
    """From a blob's sha256 to pixels. `read` gives the blob's bytes (`DatasetStore.read`); what it raises, and what
    `decode` raises, reaches whoever reads. `pool`: the threads that decode; its owner closes it."""

    read: Callable[[str], bytes]
    geometry: Geometry
    max_pixels: int
    cache: PixelCache
    pool: Executor

    def pixels(self, sha256: str, cut: Cut, keep: bool) -> Pixels:
        """uint8 [h, w, 3], shared with the cache: not to be written to."""
        found = self.cache.get(sha256, cut.name)
        if found is None:
            found = cut(decode(self.read(sha256), max_pixels=self.max_pixels))
            if keep:
                self.cache.put(sha256, cut.name, found)
        return found


@dataclass(frozen=True, eq=False)
class StoredImages:
    """An `Images` over stored blobs. `sums`: their sha256, uint8 [n, 32]; `dataset_size`: pictures of
    the dataset that these were taken from, which share the cache."""

    sums: NDArray[np.uint8]
    decoder: Decoder
    dataset_size: int

    @classmethod
    def of(cls, sha256s: Sequence[str], decoder: Decoder) -> StoredImages:
        """Of hexadecimal digests, in this order. Splits should be `take`n of one that holds the whole dataset."""
        sums = np.frombuffer(bytes.fromhex("".join(sha256s)), np.uint8).reshape(-1, 32)
        return cls(sums, decoder, len(sums))

    def __len__(self) -> int:
        return len(self.sums)

    def take(self, index: Index) -> StoredImages:
        return StoredImages(self.sums[index], self.decoder, self.dataset_size)

    @cached_property
    def digest(self) -> str:
        """Of the pictures, their order and their cut: equal wherever `read` gives equal pixels, in any dataset."""
        told = Cut(self.decoder.geometry).name.encode()
        return hashlib.sha256(told + b"\0" + self.sums.tobytes()).hexdigest()

    def read(self, index: Index, views: Views | None = None) -> Pixels:
        """uint8 [k, S, S, 3]. Raises what the first picture that failed raised; the others are not waited for."""
        cut = Cut(self.decoder.geometry, uncropped=views is not None and views.corner is not None)
        size = cut.geometry.size
        out = np.empty((len(index), size, size, 3), np.uint8)
        rows: dict[bytes, list[int]] = {}  # a picture that is wanted twice is decoded once
        for row, picture in enumerate(self.sums[index]):
            rows.setdefault(picture.tobytes(), []).append(row)
        submit = self.decoder.pool.submit
        reading = [submit(self._fill, out, own, picture, cut, views) for picture, own in rows.items()]
        try:
            for each in reading:
                each.result()
        finally:
            for each in reading:
                each.cancel()
        return out

    def _fill(self, out: Pixels, rows: Sequence[int], picture: bytes, cut: Cut, views: Views | None) -> None:
        found = self.decoder.pixels(picture.hex(), cut, self._keeps(picture, cut))
        for row in rows:
            out[row] = found if views is None else _seen(found, cut.geometry.size, views, row)

    def _keeps(self, picture: bytes, cut: Cut) -> bool:
        """A dataset larger than the cache keeps the same share of itself in every epoch. Were all of it let in, each
        picture would be evicted before its turn came again."""
        share = _FILLED * self.decoder.cache.room_bytes / max(1, self.dataset_size * cut.typical_bytes)
        return int.from_bytes(picture[:8], "big") < share * 2**64


def _seen(pixels: Pixels, size: int, views: Views, row: int) -> Pixels:
    if views.corner is not None:
        pixels = crop_at(pixels, size, *views.corner[row])
    return pixels[:, ::-1] if views.mirrored[row] else pixels
