"""Connections to the SQLite files of jobs and keys. All stores open them here, and report the same errors.

`synchronous=FULL`, so that a committed change survives a power cut.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prompts_store.durable_files import FULL
from server.errors import DiskFull, Unavailable

BUSY_S: Final = 20.0


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions are those of `transaction`.

    One thread may use it at a time; any thread may close it.
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
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A write transaction around the `with` block: committed at its end, rolled back where it raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some failures, a full disk among them, have rolled back already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`, for the switch to the write-ahead log, which ignores SQLite's timeout."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def answering(store: str) -> Iterator[None]:
    """Translate the errors of SQLite and the file system into a ServiceError that names no path.

    `store` is the name of the store in the message ("job store"). Raises DiskFull or Unavailable (store_unavailable).
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name == "SQLITE_FULL":
            raise DiskFull(f"the disk with the {store} is full") from error
        raise Unavailable(f"the {store} failed: {name}", code="store_unavailable") from error
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"the disk with the {store} is full") from error
        raise Unavailable(f"the {store} failed: {error.strerror}", code="store_unavailable") from error
