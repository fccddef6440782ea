"""A cache of decoded pictures, in memory and on disk, by the blob's sha256 and the cut."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .array_cache import ArrayCache

Pixels = NDArray[np.uint8]


class PixelCache:
    """Pixels uint8 [h, w, 3] by (blob sha256, cut). Safe for threads; processes share the folder.

    Without a folder, or with a bound of 0, that part caches nothing. The arrays are shared: never write to them.
    """

    def __init__(self, folder: Path | None, *, disk_bytes: int, memory_bytes: int) -> None:
        self._disk = ArrayCache(folder, disk_bytes, spread=True) if folder is not None else None
        self._memory = _Recent(memory_bytes)
        self.room_bytes = max(disk_bytes if folder is not None else 0, memory_bytes)

    def get(self, sha256: str, cut: str) -> Pixels | None:
        key = _key(sha256, cut)
        pixels = self._memory.get(key)
        if pixels is None and self._disk is not None:
            pixels = self._disk.get(key)
            if pixels is not None:
                self._memory.put(key, pixels)
        return pixels

    def put(self, sha256: str, cut: str, pixels: Pixels) -> None:
        key = _key(sha256, cut)
        self._memory.put(key, pixels)
        if self._disk is not None:
            self._disk.put(key, pixels)


def _key(sha256: str, cut: str) -> str:
    return hashlib.sha256(f"{sha256} {cut}".encode()).hexdigest()


class _Recent:
    """The most recently used arrays, at most `max_bytes` in total."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._arrays: OrderedDict[str, Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Pixels | None:
        with self._lock:
            pixels = self._arrays.get(key)
            if pixels is not None:
                self._arrays.move_to_end(key)
            return pixels

    def put(self, key: str, pixels: Pixels) -> None:
        if pixels.nbytes > self._max_bytes:
            return
        with self._lock:
            if key in self._arrays:
                return
            self._arrays[key] = pixels
            self._bytes += pixels.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._arrays.popitem(last=False)[1].nbytes
