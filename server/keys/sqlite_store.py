"""Keys in one SQLite file that only its owner may read, for one machine."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from server.errors import Unavailable
from server.storage.sqlite import answering, connect, transaction

from . import store
from .key import Key
from .store import Keys

MODE: Final = 0o600
_answering = partial(answering, "key store")
SCHEMA: Final = "CREATE TABLE IF NOT EXISTS keys (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID"


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
        with _answering():
            if not self._path.exists():
                return []
            with closing(self._connected()) as db:
                rows = db.execute("SELECT record FROM keys").fetchall()
        return store.in_order([_key(row[0]) for row in rows])

    def close(self) -> None:
        """Nothing to close: no connection is open between two calls."""

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
            with suppress(sqlite3.OperationalError):  # a read-only file has the table already, or is empty
                db.execute(SCHEMA)
        except BaseException:
            db.close()
            raise
        return db


def _key(text: str) -> Key:
    try:
        return Key.model_validate_json(text)
    except ValidationError:
        raise Unavailable("the key store holds a key that cannot be read", code="store_unavailable") from None
