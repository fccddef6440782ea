"""Decoded pictures, kept: the most recent in memory, more of them on disk, each under its blob's sha256 and its cut."""

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
    """uint8 arrays [h, w, 3] by (blob sha256, cut). Safe for threads; processes share the folder.

    Without a folder, or with a bound of 0, that part keeps nothing. What is handed out is shared: never write to it.
    """

    def __init__(self, folder: Path | None, *, disk_bytes: int, memory_bytes: int) -> None:
        self._disk = ArrayCache(folder, disk_bytes, spread=True) if folder is not None else None
        self._memory = _Recent(memory_bytes)
        self.room_bytes = max(disk_bytes if folder is not None else 0, memory_bytes)

    def get(self, sha256: str, cut: str) -> Pixels | None:
        key = _key(sha256, cut)
        found = self._memory.get(key)
        if found is None and self._disk is not None:
            found = self._disk.get(key)
            if found is not None:
                self._memory.put(key, found)
        return found

    def put(self, sha256: str, cut: str, pixels: Pixels) -> None:
        key = _key(sha256, cut)
        self._memory.put(key, pixels)
        if self._disk is not None:
            self._disk.put(key, pixels)


def no_cache() -> PixelCache:
    return PixelCache(None, disk_bytes=0, memory_bytes=0)


def _key(sha256: str, cut: str) -> str:
    return hashlib.sha256(f"{sha256} {cut}".encode()).hexdigest()


class _Recent:
    """The most recently used arrays, `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._arrays: OrderedDict[str, Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Pixels | None:
        with self._lock:
            found = self._arrays.get(key)
            if found is not None:
                self._arrays.move_to_end(key)
            return found

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
