"""Files that appear whole, locks that the kernel releases, and what a failing disk is called."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from server.errors import DiskFull, Unavailable

FLUSHES: Final = 8  # at once

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk() -> Iterator[None]:
    """A failing disk as a ServiceError that names no path."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull("the disk with the datasets is full") from error
        detail = f"the datasets' disk failed: {error.strerror or type(error).__name__}"
        raise Unavailable(detail, code="store_unavailable") from error


def write(path: Path, data: bytes) -> None:
    """A new file, durable on return."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(paths: Sequence[Path]) -> None:
    """Files that have been written, durable on return. Side by side: a journal commits at once whatever waits for it,
    so this is many times faster than one after the other."""
    with ThreadPoolExecutor(FLUSHES, "flush") as pool:
        for done in [pool.submit(_flush, paths[start::FLUSHES]) for start in range(FLUSHES)]:
            done.result()


def _flush(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync(folder: Path) -> None:
    """What was made, renamed and removed in a folder, durable on return."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flock(path: Path, flags: int, operation: int = fcntl.LOCK_EX) -> int:
    """A descriptor that holds the lock of a file or folder until it is closed, or its process dies."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, operation)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def flocked(path: Path) -> Iterator[None]:
    descriptor = flock(path, os.O_RDWR | os.O_CREAT)
    try:
        yield
    finally:
        os.close(descriptor)


def is_abandoned(folder: Path) -> bool:
    """Nobody holds the folder's lock: whoever made it is dead."""
    try:
        os.close(flock(folder, os.O_RDONLY | os.O_DIRECTORY, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
