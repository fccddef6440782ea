"""Keys in one SQLite file that only its owner may read, for one machine."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from server.errors import Unavailable
from server.storage.sqlite import answering, connect, transaction

from . import store
from .key import Key
from .session import Session, to_end
from .store import Keys, Sessions

MODE: Final = 0o600
_answering = partial(answering, "key store")
SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS keys (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS sessions (digest TEXT PRIMARY KEY, key TEXT, proof TEXT, ends_at REAL) WITHOUT ROWID",
)


class SqliteKeyStore:
    """The key store in the file `path`, which is created with the first key. Each call opens it again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, key: Key) -> None:
        with self._writing() as db:
            if db.execute("SELECT 1 FROM keys WHERE id = ?", (key.id,)).fetchone():
                raise store.exists(key.id)
            db.execute("INSERT INTO keys VALUES (?, ?)", (key.id, key.model_dump_json()))

    def change(self, key_id: str, become: Callable[[Key], Key]) -> Key:
        with self._writing() as db:
            row = db.execute("SELECT record FROM keys WHERE id = ?", (key_id,)).fetchone()
            if row is None:
                raise store.unknown(key_id)
            changed = become(_key(row[0]))
            db.execute("UPDATE keys SET record = ? WHERE id = ?", (changed.model_dump_json(), key_id))
        return changed

    def list(self) -> Keys:
        return store.in_order([_key(row[0]) for row in self._rows("SELECT record FROM keys")])

    def sessions(self) -> Sessions:
        return [Session(*row) for row in self._rows("SELECT digest, key, proof, ends_at FROM sessions")]

    def start_session(self, session: Session, now: float) -> None:
        with self._writing() as db:
            sessions = [Session(*row) for row in db.execute("SELECT digest, key, proof, ends_at FROM sessions")]
            over = to_end(sessions, session, now)
            db.executemany("DELETE FROM sessions WHERE digest = ?", [(ended.digest,) for ended in over])
            db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", astuple(session))

    def end_session(self, digest: str) -> None:
        with self._writing() as db:
            db.execute("DELETE FROM sessions WHERE digest = ?", (digest,))

    def close(self) -> None:
        """Nothing to close: no connection is open between two calls."""

    def _rows(self, query: str) -> Sequence[tuple[Any, ...]]:
        with _answering():
            if not self._path.exists():
                return []
            with closing(self._connected()) as db:
                return db.execute(query).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with _answering():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT, MODE))
            with closing(self._connected()) as db, transaction(db):
                yield db

    def _connected(self) -> sqlite3.Connection:
        db = connect(self._path)
        try:
            with suppress(sqlite3.OperationalError):  # a read-only file has the tables already, or is empty
                for statement in SCHEMA:
                    db.execute(statement)
        except BaseException:
            db.close()
            raise
        return db


def _key(text: str) -> Key:
    try:
        return Key.model_validate_json(text)
    except ValidationError:
        raise Unavailable("the key store holds a key that cannot be read", code="store_unavailable") from None
