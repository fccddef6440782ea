"""The pictures of a stored dataset, decoded on demand and cached.

    sha256 ─► pixel cache ─ hit ─────────────────────────────────► crop, mirror ─► its row of the batch
                 └─ miss ─► blob ─decode─► picture ─cut─► pixels ─┘   └─► cached, if the dataset's share allows

Memory is bounded for any size of dataset: 32 bytes a picture, one full-size picture per thread, the batch, and the
cache.
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
    """Reads a blob by its sha256 and decodes it. `read` returns the blob's bytes (`DatasetStore.read`). Its errors, and
    those of decoding, are raised where the pictures are read. `pool`: the threads that decode; its owner closes it."""

    read: Callable[[str], bytes]
    geometry: Geometry
    max_pixels: int
    cache: PixelCache
    pool: Executor

    def pixels(self, sha256: str, cut: Cut, keep: bool) -> Pixels:
        """Pixels uint8 [h, w, 3], shared with the cache: never write to them. `keep`: whether to cache them."""
        pixels = self.cache.get(sha256, cut.name)
        if pixels is None:
            pixels = cut(decode(self.read(sha256), max_pixels=self.max_pixels))
            if keep:
                self.cache.put(sha256, cut.name, pixels)
        return pixels


@dataclass(frozen=True, eq=False)
class StoredImages:
    """An `Images` over stored blobs. `sums`: their sha256, uint8 [n, 32]. `dataset_size`: the number of pictures of the
    whole dataset, which share the cache."""

    sums: NDArray[np.uint8]
    decoder: Decoder
    dataset_size: int

    @classmethod
    def of(cls, sha256s: Sequence[str], decoder: Decoder) -> StoredImages:
        """The pictures of hexadecimal digests, in this order. Make one for the whole dataset and `take` the splits."""
        sums = np.frombuffer(bytes.fromhex("".join(sha256s)), np.uint8).reshape(-1, 32)
        return cls(sums, decoder, len(sums))

    def __len__(self) -> int:
        return len(self.sums)

    def take(self, index: Index) -> StoredImages:
        return StoredImages(self.sums[index], self.decoder, self.dataset_size)

    @cached_property
    def digest(self) -> str:
        """A digest of the pictures, their order and their cut: equal for equal pixels, in any dataset."""
        cut = Cut(self.decoder.geometry).name.encode()
        return hashlib.sha256(cut + b"\0" + self.sums.tobytes()).hexdigest()

    def read(self, index: Index, views: Views | None = None) -> Pixels:
        """Pixels uint8 [k, S, S, 3]. Raises the error of the first picture that fails, without waiting for others."""
        cut = Cut(self.decoder.geometry, uncropped=views is not None and views.corner is not None)
        size = cut.geometry.size
        out = np.empty((len(index), size, size, 3), np.uint8)
        rows: dict[bytes, list[int]] = {}  # a picture that occurs twice is decoded once
        for row, picture in enumerate(self.sums[index]):
            rows.setdefault(picture.tobytes(), []).append(row)
        submit = self.decoder.pool.submit
        futures = [submit(self._fill, out, places, picture, cut, views) for picture, places in rows.items()]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
        return out

    def _fill(self, out: Pixels, rows: Sequence[int], picture: bytes, cut: Cut, views: Views | None) -> None:
        pixels = self.decoder.pixels(picture.hex(), cut, self._keeps(picture, cut))
        for row in rows:
            out[row] = pixels if views is None else _augmented(pixels, cut.geometry.size, views, row)

    def _keeps(self, picture: bytes, cut: Cut) -> bool:
        """Whether a picture is cached. Of a dataset larger than the cache the same share is cached in every epoch: were
        all of it cached, each picture would be evicted before the next epoch reads it."""
        share = _FILLED * self.decoder.cache.room_bytes / max(1, self.dataset_size * cut.typical_bytes)
        return int.from_bytes(picture[:8], "big") < share * 2**64


def _augmented(pixels: Pixels, size: int, views: Views, row: int) -> Pixels:
    if views.corner is not None:
        pixels = crop_at(pixels, size, *views.corner[row])
    return pixels[:, ::-1] if views.mirrored[row] else pixels
