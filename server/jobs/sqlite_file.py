"""The SQLite file of jobs: its schema, how it is opened, and what its failures are called.

Write-ahead log, so that readers never wait; `synchronous=FULL`, so that an accepted job outlives a power cut.
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

MIGRATIONS: Final = (  # entry n brings a file from schema version n to n + 1; what is released is never edited
    (
        """CREATE TABLE jobs (
            id TEXT PRIMARY KEY, task TEXT NOT NULL, dataset TEXT NOT NULL, method TEXT NOT NULL, recipe TEXT NOT NULL,
            state TEXT NOT NULL, attempt INTEGER NOT NULL, failures INTEGER NOT NULL, max_attempts INTEGER NOT NULL,
            priority INTEGER NOT NULL, tenant TEXT NOT NULL, idempotency_key TEXT, worker TEXT, lease_expires_at REAL,
            progress TEXT NOT NULL, version TEXT, metrics TEXT NOT NULL, error TEXT, cancel_requested INTEGER NOT NULL,
            checkpoint TEXT, created_at REAL NOT NULL, started_at REAL, finished_at REAL
        ) WITHOUT ROWID""",
        "CREATE INDEX jobs_by_state ON jobs (state, priority DESC, id)",
        "CREATE INDEX jobs_by_task ON jobs (task, id)",
        "CREATE UNIQUE INDEX jobs_by_key ON jobs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL",
        """CREATE TABLE events (
            job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
            seq INTEGER NOT NULL, type TEXT NOT NULL, at REAL NOT NULL, data TEXT NOT NULL,
            PRIMARY KEY (job, seq)
        ) WITHOUT ROWID""",
    ),
    ("ALTER TABLE jobs ADD COLUMN publish TEXT NOT NULL DEFAULT 'always'",),
)


def connect(path: Path) -> sqlite3.Connection:
    """In autocommit mode: transactions begin and end where this file says so. Used by one thread, closed by any."""
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def migrate(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise Unavailable(
            f"the job file has schema {version}, written by a newer lensrack; this one reads up to {len(MIGRATIONS)}",
            code="store_unavailable",
        )
    db.execute("PRAGMA journal_mode = WAL")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        for statement in statements:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")


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
def backend() -> Iterator[None]:
    """A failing file as a ServiceError that names no path."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name == "SQLITE_FULL":
            raise DiskFull("the disk with the job store is full") from error
        raise Unavailable(f"the job store failed: {name}", code="store_unavailable") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the disk with the job store is full") from error
        raise Unavailable(f"the job store failed: {error.strerror}", code="store_unavailable") from error
