"""A cache of arrays on disk, bounded in bytes, shared by threads and processes:

    <folder>/<x>/<key>        one array (`array_file`); its modification time is the time of its last use
    <folder>/<x>/new          the file being written; the holder of the lock overwrites one that a crash left
    <folder>/<x>/lock         locked for writing and evicting in this shard; contains the shard's size in bytes

Readers take no lock: files appear whole by renaming, and an array that is evicted meanwhile is computed again. The size
is raised before a file is written, so a writer that is killed at any point leaves it too high at worst, never too low.
It is counted again when the shard seems full and when a process opens the cache. The bound therefore holds at any time,
and a shard is listed at most once per eighth of its size written.

A failure of the cache never ends a fit: on a full or failing disk arrays are computed again, and the log says so once.
The disk's last gigabyte is reserved for what cannot be computed again: checkpoints, bundles, datasets.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .array_file import Array, DamagedError, read, size_of, write

log = logging.getLogger(__name__)

BLOCK: Final = 4096  # bytes: what the smallest file takes
RESERVE_BYTES: Final = 2**30
LOCK: Final = "lock"
NEW: Final = "new"
_HEX: Final = "0123456789abcdef"
_COUNT_BYTES: Final = 8


class ArrayCache:
    """Evicts the least recently used arrays. Keys are hexadecimal digests.

    `spread` divides the keys, and `max_bytes`, among 16 shards, for many small arrays: an array larger than a shard is
    not kept. Feature arrays are few and large and use one shard.
    """

    def __init__(self, folder: Path, max_bytes: int, *, spread: bool) -> None:
        self._folder, self._bound = folder, max_bytes // (16 if spread else 1)
        self._shards = {name: folder / name for name in (_HEX if spread else "_")}
        self._spread, self.max_bytes = spread, max_bytes
        self._logged = threading.Event()
        self._trim_all()

    def get(self, key: str) -> Array | None:
        """The array of `key`, verified; None where it is missing, or damaged and now removed."""
        path = self._shard(key) / key
        try:
            array = read(path, key)
            now = time.time_ns()
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            log.warning("a damaged file in the cache %s is made again: %s", self._folder.name, error)
            path.unlink(missing_ok=True)
            return None
        except OSError as error:
            self._log_once(error)
            return None
        return array

    def put(self, key: str, array: Array) -> None:
        """Store `array`, unless `key` is stored already: equal keys have equal arrays."""
        if _on_disk(size_of(array)) > self._bound:
            return
        shard = self._shard(key)
        try:
            with _locked(shard) as lock:
                self._put(shard, lock, key, array)
        except OSError as error:
            self._log_once(error)

    def _put(self, shard: Path, lock: int, key: str, array: Array) -> None:
        if (shard / key).exists():
            return
        size, used = _on_disk(size_of(array)), _read_size(lock)
        if used is None or used + size > self._bound:
            used = _trim(shard, self._bound, room=size)
        _leave_reserve(shard, size)
        _write_size(lock, used + size)
        try:
            write(shard / NEW, key, array)
            os.replace(shard / NEW, shard / key)
        except BaseException:
            (shard / NEW).unlink(missing_ok=True)
            raise

    def _shard(self, key: str) -> Path:
        return self._shards[key[0] if self._spread else "_"]

    def _trim_all(self) -> None:
        """Correct the sizes after a crash, and evict where the bound was lowered."""
        try:
            for shard in self._shards.values():
                if shard.is_dir():
                    with _locked(shard) as lock:
                        _write_size(lock, _trim(shard, self._bound, room=0))
        except OSError as error:
            self._log_once(error)

    def _log_once(self, error: OSError) -> None:
        if not self._logged.is_set():
            self._logged.set()
            log.warning("the cache %s cannot be used: %s", self._folder.name, error.strerror or error)


def _trim(shard: Path, bound: int, *, room: int) -> int:
    """Remove the file of a killed writer and, where `room` bytes do not fit, evict the least recently used arrays down
    to 7/8 of the bound. Returns the size of the shard in bytes. The caller holds the lock."""
    files = sorted(_files(shard), reverse=True)  # a stack with the oldest on top
    used = sum(size for _, size, _ in files)
    if used + room <= bound:
        return used
    while files and used + room > bound - bound // 8:
        _, size, path = files.pop()
        path.unlink(missing_ok=True)
        used -= size
    return used


def _files(shard: Path) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, bytes and path of every array."""
    (shard / NEW).unlink(missing_ok=True)
    with os.scandir(shard) as entries:
        for entry in entries:
            if entry.name == LOCK:
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:  # a reader found it damaged
                continue
            yield stat.st_mtime_ns, _on_disk(stat.st_size), Path(entry.path)


@contextmanager
def _locked(shard: Path) -> Iterator[int]:
    """The shard's lock file, locked against threads and processes; the kernel unlocks it when a process dies."""
    shard.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(shard / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read_size(lock: int) -> int | None:
    """The recorded size of the shard in bytes; None where none is recorded."""
    content = os.pread(lock, _COUNT_BYTES, 0)
    return int.from_bytes(content, "little") if len(content) == _COUNT_BYTES else None


def _write_size(lock: int, used: int) -> None:
    os.pwrite(lock, used.to_bytes(_COUNT_BYTES, "little"), 0)


def _leave_reserve(shard: Path, size: int) -> None:
    disk = os.statvfs(shard)
    if disk.f_bavail * disk.f_frsize - size < RESERVE_BYTES:
        raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES >> 20} MiB of its disk are free")


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
