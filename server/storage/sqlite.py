"""SQLite files of jobs and keys: opened alike, and failing alike.

`synchronous=FULL`, so that what was accepted outlives a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from server.errors import DiskFull, Unavailable

BUSY_S: Final = 20.0


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions begin and end where the caller says so.

    Used by one thread at a time, closed by any.
    """
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time: the switch to the write-ahead log does not wait for its turn by itself."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def answering(store: str) -> Iterator[None]:
    """Whatever SQLite or the file system does, as a ServiceError that names no path.

    `store` is what is kept there ("job store"). Raises DiskFull or Unavailable (store_unavailable).
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name == "SQLITE_FULL":
            raise DiskFull(f"the disk with the {store} is full") from error
        raise Unavailable(f"the {store} failed: {name}", code="store_unavailable") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk with the {store} is full") from error
        raise Unavailable(f"the {store} failed: {error.strerror}", code="store_unavailable") from error
