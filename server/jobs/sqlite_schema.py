"""The tables of the SQLite job store, and the migration of older files."""

from __future__ import annotations

import sqlite3
from typing import Final

from server.errors import Unavailable
from server.storage.sqlite import transaction

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
READS_UP_TO: Final = 3  # which lacks the column `checkpoint`, that nobody uses; the version before reads up to 2


def migrate(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > READS_UP_TO:
        raise Unavailable(
            f"the job file has schema {version}, written by a newer lensrack; this one reads up to {READS_UP_TO}",
            code="store_unavailable",
        )
    db.execute("PRAGMA journal_mode = WAL")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        with transaction(db):
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
