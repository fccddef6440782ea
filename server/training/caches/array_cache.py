"""Arrays on disk that can be made again, bounded in bytes, shared by threads and processes:

    <folder>/<x>/<key>        one array (`array_file`); its time of change is when it was last used
    <folder>/<x>/new          being written; whoever holds the lock may overwrite a dead writer's
    <folder>/<x>/lock         held by whoever writes or evicts in this shard; holds the shard's size in bytes

Readers take no lock: files appear whole by renaming, and one that is evicted meanwhile is simply made again. The size
is raised before a file is written, so a writer killed at any point leaves it too high at worst, never too low; it is
counted anew when the shard seems full and when a process opens the cache. The bound therefore holds at every moment,
and nothing lists a shard more often than once in an eighth of its bytes written.

Nothing here may end a fit: a disk that is full or fails costs the time of making the array again, and is told to the
log once. The disk's last gigabyte is left to what cannot be made again: checkpoints, bundles, datasets.
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
    """Least recently used arrays go first. Keys are hexadecimal digests.

    `spread` shares the keys, and `max_bytes`, among 16 shards, for many small arrays: an array larger than its shard
    is not kept. Arrays of features are few and large: one shard.
    """

    def __init__(self, folder: Path, max_bytes: int, *, spread: bool) -> None:
        self._folder, self._bound = folder, max_bytes // (16 if spread else 1)
        self._shards = {name: folder / name for name in (_HEX if spread else "_")}
        self._spread, self.max_bytes = spread, max_bytes
        self._told = threading.Event()
        self._trim_all()

    def get(self, key: str) -> Array | None:
        """The array kept under `key`, verified; None where there is none, or a damaged one, which is removed."""
        path = self._shard(key) / key
        try:
            found = read(path, key)
            now = time.time_ns()
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            log.warning("a damaged file in the cache %s is made again: %s", self._folder.name, error)
            path.unlink(missing_ok=True)
            return None
        except OSError as error:
            self._tell(error)
            return None
        return found

    def put(self, key: str, array: Array) -> None:
        """Keep `array` until others were used more recently. What is there under `key` already is the same."""
        if _on_disk(size_of(array)) > self._bound:
            return
        shard = self._shard(key)
        try:
            with _locked(shard) as lock:
                self._put(shard, lock, key, array)
        except OSError as error:
            self._tell(error)

    def _put(self, shard: Path, lock: int, key: str, array: Array) -> None:
        if (shard / key).exists():
            return
        size, used = _on_disk(size_of(array)), _used(lock)
        if used is None or used + size > self._bound:
            used = _trim(shard, self._bound, room=size)
        _leave_reserve(shard, size)
        _note(lock, used + size)
        try:
            write(shard / NEW, key, array)
            os.replace(shard / NEW, shard / key)
        except BaseException:
            (shard / NEW).unlink(missing_ok=True)
            raise

    def _shard(self, key: str) -> Path:
        return self._shards[key[0] if self._spread else "_"]

    def _trim_all(self) -> None:
        """After what was killed, and after a bound that was lowered."""
        try:
            for shard in self._shards.values():
                if shard.is_dir():
                    with _locked(shard) as lock:
                        _note(lock, _trim(shard, self._bound, room=0))
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told.is_set():
            self._told.set()
            log.warning("the cache %s cannot be used: %s", self._folder.name, error.strerror or error)


def _trim(shard: Path, bound: int, *, room: int) -> int:
    """Remove what a dead writer left and, where `room` bytes do not fit, the least recently used down to 7/8 of the
    bound. Returns the bytes that are left. The caller holds the lock."""
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
    """The shard's lock file, held against threads and processes alike; the kernel lets go for one that dies."""
    shard.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(shard / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _used(lock: int) -> int | None:
    """The shard's noted size; None where nobody has noted one."""
    noted = os.pread(lock, _COUNT_BYTES, 0)
    return int.from_bytes(noted, "little") if len(noted) == _COUNT_BYTES else None


def _note(lock: int, used: int) -> None:
    os.pwrite(lock, used.to_bytes(_COUNT_BYTES, "little"), 0)


def _leave_reserve(shard: Path, size: int) -> None:
    found = os.statvfs(shard)
    if found.f_bavail * found.f_frsize - size < RESERVE_BYTES:
        raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES >> 20} MiB of its disk are free")


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
