"""Jobs in one SQLite file, for the threads and processes of one machine.

A change is one `BEGIN IMMEDIATE` transaction: read the job, compute the step in `lifecycle`, write job and events.
Open the store after a fork, never before it: SQLite's connections do not survive one.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from server.errors import BadRequest, NotFound, Unavailable
from server.storage.sqlite import answering, connect, exclusive, transaction

from . import lifecycle
from .job import STATES, Event, Job, State, is_id, new_id, to_json
from .lifecycle import Step
from .sqlite_schema import migrate
from .stepwise import StepwiseJobStore
from .store import Events, Jobs

_answering = partial(answering, "job store")
_COLUMNS: Final = tuple(field.name for field in fields(Job))
_JSON: Final = frozenset({"recipe", "progress", "metrics", "error"})
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)} FROM jobs"
_WRITE: Final = (
    f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)}) "
    f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS[1:])}"
)
_WAITING: Final = (
    f"{_SELECT} WHERE state = 'queued' OR (state = 'running' AND lease_expires_at <= ?) "
    "ORDER BY priority DESC, id LIMIT 1"
)
_EVENT: Final = (
    "INSERT INTO events SELECT ?, COALESCE(MAX(seq), 0) + 1, ?, ?, ? FROM events WHERE job = ? RETURNING seq"
)


@dataclass(frozen=True)
class _Connection:
    """`used` is held during a call, by the thread whose connection it is."""

    db: sqlite3.Connection
    used: threading.RLock = field(default_factory=threading.RLock)


class SqliteJobStore(StepwiseJobStore):
    """The job store in the file `path`, created with its folder if absent. `now` returns seconds since the epoch."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._connections: dict[threading.Thread, _Connection] = {}
        self._lock = threading.Lock()
        self._closed = False
        with _answering():
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(path.parent), self._connected() as db:
                migrate(db)
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a killed process leaves megabytes

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _add(self, request: Job) -> Job:
        with self._transaction() as db:
            if known := _by_key(db, request.tenant, request.idempotency_key):
                return lifecycle.resubmitted(known, request)
            now = self._now()
            newest = db.execute("SELECT MAX(id) FROM jobs").fetchone()[0]
            job = replace(request, id=new_id(now, after=newest), created_at=now)
            return _save(db, lifecycle.submitted(job), now)

    def submitted_with(self, idempotency_key: str, *, tenant: str = "") -> Job | None:
        with self._connected() as db:
            return _by_key(db, tenant, idempotency_key)

    def get(self, job_id: str) -> Job:
        with self._connected() as db:
            return _load(db, job_id)

    def list(
        self,
        *,
        task: str | None = None,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 50,
        task_prefix: str = "",
    ) -> tuple[Jobs, str | None]:
        if cursor is not None and not is_id(cursor):
            raise BadRequest("expected the cursor of an earlier page, got something else")
        conditions = {"task =": task, "state =": state, "id <": cursor}
        if task_prefix:
            conditions |= {"task >=": task_prefix, "task <": f"{task_prefix}\x7f"}  # after every letter of a name
        conditions = {condition: value for condition, value in conditions.items() if value is not None}
        where = " AND ".join(f"{condition} ?" for condition in conditions) or "TRUE"
        with self._connected() as db:
            rows = db.execute(f"{_SELECT} WHERE {where} ORDER BY id DESC LIMIT ?", (*conditions.values(), limit + 1))
            jobs = [_job(row) for row in rows]
        page = jobs[:limit]
        return page, page[-1].id if page and len(jobs) > limit else None

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events:
        with self._connected() as db:
            rows = db.execute(
                "SELECT seq, type, at, data FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?",
                (job_id, after, limit),
            )
            events = [Event(seq, type_, at, json.loads(data)) for seq, type_, at, data in rows]
        if not events:
            self.get(job_id)
        return events

    def counts(self) -> dict[State, int]:
        with self._connected() as db:
            counts = dict(db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
        return {state: counts.get(state, 0) for state in STATES}

    # --- working ------------------------------------------------------------------------------------------------------

    def claim(self, worker: str, lease_s: float) -> Job | None:
        with self._connected() as db:  # a read, so that the many polls of idle workers do not block writers
            if db.execute(_WAITING, (self._now(),)).fetchone() is None:
                return None
        with self._transaction() as db:
            now = self._now()
            while (row := db.execute(_WAITING, (now,)).fetchone()) is not None:
                job = _save(db, lifecycle.claimed(_job(row), worker=worker, lease_s=lease_s, now=now), now)
                if not job.finished:
                    return job
        return None

    def append_event(self, job_id: str, attempt: int, type_: str, data: Mapping[str, Any]) -> Event:
        with self._transaction() as db:
            now = self._now()
            lifecycle.noted(_load(db, job_id), attempt, type_, data)
            return _append(db, job_id, type_, data, now)

    # --- governing ----------------------------------------------------------------------------------------------------

    def prune(self, older_than_s: float) -> Jobs:
        with self._transaction() as db:
            rows = db.execute(f"{_SELECT} WHERE finished_at < ? ORDER BY id", (self._now() - older_than_s,))
            old = [_job(row) for row in rows]
            db.executemany("DELETE FROM jobs WHERE id = ?", [(job.id,) for job in old])
        return old

    def close(self) -> None:
        """Refuse further calls, and close the connections of all threads: that of a thread inside a call at its end."""
        with self._lock:
            self._closed = True
            connections = [*self._connections.values()]
            self._connections.clear()
        for connection in connections:
            if connection.used.acquire(blocking=False):  # closed under a running statement, SQLite crashes
                connection.db.close()
                connection.used.release()

    # --- connections --------------------------------------------------------------------------------------------------

    def _step(self, job_id: str, decide: Callable[[Job, float], Step]) -> Job:
        with self._transaction() as db:
            now = self._now()
            return _save(db, decide(_load(db, job_id), now), now)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as db, transaction(db):
            yield db

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection."""
        with _answering():
            connection = self._connection()
            with connection.used:
                try:
                    yield connection.db
                finally:
                    if self._closed:
                        connection.db.close()

    def _connection(self) -> _Connection:
        """Closes the connections of threads that have ended."""
        me = threading.current_thread()
        with self._lock:
            if self._closed:
                raise Unavailable("the job store is closed", code="store_unavailable")
            if me not in self._connections:
                for thread in [thread for thread in self._connections if not thread.is_alive()]:
                    self._connections.pop(thread).db.close()
                self._connections[me] = _Connection(connect(self._path))
            return self._connections[me]


# --- rows -------------------------------------------------------------------------------------------------------------


def _load(db: sqlite3.Connection, job_id: str) -> Job:
    row = db.execute(f"{_SELECT} WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no job {job_id[:64]!r}", code="job_not_found")
    return _job(row)


def _by_key(db: sqlite3.Connection, tenant: str, key: str | None) -> Job | None:
    row = db.execute(f"{_SELECT} WHERE tenant = ? AND idempotency_key = ?", (tenant, key)).fetchone()
    return _job(row) if row else None


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in _JSON:
        values[name] = json.loads(values[name]) if values[name] is not None else None
    return Job(**values | {"cancel_requested": bool(values["cancel_requested"])})


def _save(db: sqlite3.Connection, step: Step, now: float) -> Job:
    values = {name: getattr(step.job, name) for name in _COLUMNS}
    for name in _JSON:
        values[name] = to_json(values[name]) if values[name] is not None else None
    db.execute(_WRITE, values)
    for type_, data in step.events:
        _append(db, step.job.id, type_, data, now)
    return _load(db, step.job.id)


def _append(db: sqlite3.Connection, job_id: str, type_: str, data: Mapping[str, Any], now: float) -> Event:
    text = to_json(data)
    seq = db.execute(_EVENT, (job_id, type_, now, text, job_id)).fetchone()[0]
    return Event(seq, type_, now, json.loads(text))
