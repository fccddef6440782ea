"""Durable writes, locks that the kernel releases with the process, and disk failures as service errors."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prompts_store import durable_files
from server.errors import DiskFull, Unavailable

sync: Final = durable_files.sync_folder
FLUSHES: Final = 8  # threads that flush at once

FULL: Final = (*durable_files.FULL, errno.EFBIG)  # EFBIG: the process's limit of a file's size


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn an OSError of the block into DiskFull or Unavailable, without a path in the message."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull("the disk with the datasets is full") from error
        detail = f"the datasets' disk failed: {error.strerror or type(error).__name__}"
        raise Unavailable(detail, code="store_unavailable") from error


def write(path: Path, data: bytes) -> None:
    """Create a file with this content, durable on return. Raises FileExistsError."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(paths: Sequence[Path]) -> None:
    """Make written files durable. In parallel: the journal commits all that wait for it at once, so this is many times
    faster than one after the other."""
    with ThreadPoolExecutor(FLUSHES, "flush") as pool:
        for future in [pool.submit(_flush, paths[start::FLUSHES]) for start in range(FLUSHES)]:
            future.result()


def _flush(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
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
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created when absent."""
    descriptor = flock(path, os.O_RDWR | os.O_CREAT)
    try:
        yield
    finally:
        os.close(descriptor)


def is_abandoned(folder: Path) -> bool:
    """Whether the process that made the folder is dead: its lock is free."""
    try:
        os.close(flock(folder, os.O_RDONLY | os.O_DIRECTORY, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
