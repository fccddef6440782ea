"""Jobs in Redis, for several machines: any number of servers and workers share one queue.

A change reads a job with its stamp, computes the step in `lifecycle`, and writes job, events and indexes by a script
that refuses if the stamp has changed; then the change starts again: see `redis_scripts`.

Jobs are as durable as the Redis server: give it an append-only file, and `maxmemory-policy noeviction`. Leases end by
the clocks of the claiming workers; where clocks disagree, leases are longer or shorter, and the fencing still holds.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, cast

from server.errors import BadRequest, NotFound, Unavailable
from server.storage.redis import answering, connect

from . import lifecycle, redis_scripts
from .job import STATES, Event, Job, State, is_id, new_id, to_json
from .lifecycle import Step
from .stepwise import StepwiseJobStore
from .store import Events, Jobs

MAX_TRIES: Final = 1000  # changes that are lost to faster writers before giving up
_answering = partial(answering, "job store")
BATCH: Final = 100  # jobs that one listing script reads: a script blocks the server


class _StoredJob(NamedTuple):
    """A job as it is stored, with its stamp."""

    job: Job
    stamp: str


class RedisJobStore(StepwiseJobStore):
    """The job store over a Redis server (6.2 or newer, not a cluster: a change touches several keys).

    Raises `ValueError` for a URL of another form. `now` gives seconds since the epoch.
    """

    # {0} is the prefix. Indexes are sorted sets of job ids.
    JOB = "{0}:jobs:job:{1}"  # hash: the job as JSON, its stamp
    EVENTS = "{0}:jobs:events:{1}"  # list of [type, at, data]; an event's number is its position
    WAITING = "{0}:jobs:waiting"  # the queue: -priority, then age
    LEASES = "{0}:jobs:leases"  # running jobs by the end of their lease
    FINISHED = "{0}:jobs:finished"  # by the time they finished
    STATE = "{0}:jobs:state:{1}"  # this and the next two by age
    TASK = "{0}:jobs:task:{1}"
    ALL = "{0}:jobs:all"
    NEWEST = "{0}:jobs:newest"  # the last id; kept when its job is deleted
    KEYS = "{0}:jobs:keys:{1}"  # per tenant, hash: idempotency key → id

    def __init__(self, url: str, *, prefix: str = "lensrack", now: Callable[[], float] = time.time) -> None:
        self._prefix, self._now = prefix, now
        self._redis = connect(url)
        self._change_script = self._redis.register_script(redis_scripts.CHANGE)
        self._submit_script = self._redis.register_script(redis_scripts.SUBMIT)
        self._next_script = self._redis.register_script(redis_scripts.NEXT)
        self._page_script = self._redis.register_script(redis_scripts.PAGE)
        self._forget_script = self._redis.register_script(redis_scripts.FORGET)

    def __repr__(self) -> str:
        return f"RedisJobStore(prefix={self._prefix!r})"

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _add(self, request: Job) -> Job:
        for _ in range(MAX_TRIES):
            newest, known = self._before_submit(request.tenant, request.idempotency_key)
            if known:
                return lifecycle.resubmitted(known, request)
            now = self._now()
            job = replace(request, id=new_id(now, after=newest), created_at=now)
            if self._submitted(newest, lifecycle.submitted(job), now):
                return job
        raise _outrun()

    def submitted_with(self, idempotency_key: str, *, tenant: str = "") -> Job | None:
        return self._before_submit(tenant, idempotency_key)[1]

    def get(self, job_id: str) -> Job:
        return self._read(job_id).job

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
        conditions: dict[str, str | None] = {"task": task, "state": state}
        filters = {name: value for name, value in conditions.items() if value is not None}
        candidates = self._newest_first(self._narrowest(filters), cursor)
        covered = (job for job in candidates if job.task.startswith(task_prefix))
        matching = (job for job in covered if all(getattr(job, name) == value for name, value in filters.items()))
        jobs = [*islice(matching, limit + 1)]
        page = jobs[:limit]
        return page, page[-1].id if page and len(jobs) > limit else None

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events:
        first, texts = max(after, 0), []
        if limit > 0 and is_id(job_id):
            with _answering():
                texts = self._redis.lrange(self._key(self.EVENTS, job_id), first, first + limit - 1)
        if not texts:
            self.get(job_id)
        return [Event(seq, *json.loads(text)) for seq, text in enumerate(texts, start=first + 1)]

    def counts(self) -> dict[State, int]:
        with _answering(), self._redis.pipeline(transaction=True) as pipe:
            for state in STATES:
                pipe.zcard(self._key(self.STATE, state))
            return dict(zip(STATES, pipe.execute(), strict=True))

    # --- working ------------------------------------------------------------------------------------------------------

    def claim(self, worker: str, lease_s: float) -> Job | None:
        while (kept := self._next(now := self._now())) is not None:
            step = lifecycle.claimed(kept.job, worker=worker, lease_s=lease_s, now=now)
            if self._written(kept, step, now) and not step.job.finished:
                return step.job
        return None

    def append_event(self, job_id: str, attempt: int, type_: str, data: Mapping[str, Any]) -> Event:
        _, seq, now = self._change(job_id, lambda job, _: lifecycle.noted(job, attempt, type_, data))
        return Event(seq, type_, now, json.loads(to_json(data)))

    # --- governing ----------------------------------------------------------------------------------------------------

    def prune(self, older_than_s: float) -> Jobs:
        before = self._now() - older_than_s
        with _answering():
            ids = sorted(map(str, self._redis.zrangebyscore(self._key(self.FINISHED), "-inf", f"({before!r}")))
        old = [kept.job for job_id in ids if (kept := self._find(job_id))]
        return [job for job in old if self._forgotten(job)]

    def close(self) -> None:
        self._redis.close()

    # --- one job ------------------------------------------------------------------------------------------------------

    def _key(self, template: str, part: str = "") -> str:
        return template.format(self._prefix, part)

    def _find(self, job_id: str) -> _StoredJob | None:
        with _answering():
            text, stamp = self._redis.hmget(self._key(self.JOB, job_id), "job", "stamp")
        return _kept(_str(text), _str(stamp))

    def _read(self, job_id: str) -> _StoredJob:
        kept = self._find(job_id) if is_id(job_id) else None
        if kept is None:
            raise NotFound(f"there is no job {job_id[:64]!r}", code="job_not_found")
        return kept

    def _step(self, job_id: str, decide: Callable[[Job, float], Step]) -> Job:
        return self._change(job_id, decide)[0]

    def _change(self, job_id: str, decide: Callable[[Job, float], Step]) -> tuple[Job, int, float]:
        """The job as it now is, the number of its last event and the time of the change."""
        for _ in range(MAX_TRIES):
            kept, now = self._read(job_id), self._now()
            step = decide(kept.job, now)
            if seq := self._written(kept, step, now):
                return _job(_text(step.job)), seq, now
        raise _outrun()

    def _written(self, kept: _StoredJob, step: Step, now: float) -> int:
        """The number of the job's last event, or 0 when another writer was faster."""
        with _answering():
            return int(self._change_script(self._keys(kept.job, step.job), _arguments(kept.stamp, step, now)))

    def _keys(self, before: Job, after: Job) -> tuple[str, ...]:
        records = (self._key(self.JOB, after.id), self._key(self.EVENTS, after.id))
        queues = (self._key(self.WAITING), self._key(self.LEASES), self._key(self.FINISHED))
        return *records, *queues, self._key(self.STATE, before.state), self._key(self.STATE, after.state)

    def _next(self, now: float) -> _StoredJob | None:
        """The waiting job that is to be claimed next."""
        with _answering():
            rows = self._next_script([self._key(self.WAITING), self._key(self.LEASES)], [now, self._key(self.JOB)])
        waiting = [kept for row in rows if (kept := _kept(*row))]
        return min(waiting, key=lambda kept: (-kept.job.priority, kept.job.id), default=None)

    # --- submitting and deleting --------------------------------------------------------------------------------------

    def _before_submit(self, tenant: str, key: str | None) -> tuple[str | None, Job | None]:
        """The newest id, and the job of the idempotency key. Read in this order: a later submission with the key
        changes the newest id, and this one is refused."""
        with _answering():
            newest = _str(self._redis.get(self._key(self.NEWEST)))
            known = _str(self._redis.hget(self._key(self.KEYS, tenant), key)) if key is not None else None
        kept = self._find(known) if known else None
        return newest, kept.job if kept else None

    def _submitted(self, newest: str | None, step: Step, now: float) -> bool:
        job = step.job
        keys = [*self._keys(job, job), self._key(self.NEWEST), *self._by_age(job)]
        if job.idempotency_key is not None:
            keys.append(self._key(self.KEYS, job.tenant))
        with _answering():
            return bool(self._submit_script(keys, _arguments(newest or "", step, now)))

    def _by_age(self, job: Job) -> tuple[str, str]:
        return self._key(self.ALL), self._key(self.TASK, job.task)

    def _forgotten(self, job: Job) -> bool:
        records = [self._key(self.JOB, job.id), self._key(self.EVENTS, job.id), self._key(self.KEYS, job.tenant)]
        indexes = [*self._by_age(job), self._key(self.FINISHED), self._key(self.STATE, job.state)]
        with _answering():
            return bool(self._forget_script(records + indexes, [job.id, job.idempotency_key or ""]))

    # --- listing ------------------------------------------------------------------------------------------------------

    def _narrowest(self, filters: Mapping[str, str]) -> str:
        """The shortest index that holds all jobs of the filters."""
        templates = {"task": self.TASK, "state": self.STATE}
        indexes = [self._key(templates[name], value) for name, value in filters.items()] or [self._key(self.ALL)]
        if len(indexes) == 1:
            return indexes[0]
        with _answering():
            return min(indexes, key=self._redis.zcard)

    def _newest_first(self, index: str, cursor: str | None) -> Iterator[Job]:
        below = f"({cursor}" if cursor else "+"
        while True:
            with _answering():
                texts = self._page_script([index], [below, BATCH, self._key(self.JOB)])
            jobs = [_job(text) for text in texts]
            yield from jobs
            if len(jobs) < BATCH:
                return
            below = f"({jobs[-1].id}"


# --- records ----------------------------------------------------------------------------------------------------------


def _str(value: str | bytes | None) -> str | None:
    """The client decodes answers to text, which its types do not express."""
    return cast("str | None", value)


def _text(job: Job) -> str:
    return to_json(asdict(job))


def _job(text: str) -> Job:
    fields = json.loads(text)
    fields.pop("checkpoint", None)  # of records that older versions wrote
    return Job(**fields)


def _kept(text: str | None, stamp: str | None) -> _StoredJob | None:
    return _StoredJob(_job(text), stamp) if text is not None and stamp is not None else None


def _arguments(read: str, step: Step, now: float) -> list[str | float]:
    """The arguments of a script: see `redis_scripts`."""
    job = step.job
    waiting: str | float = -job.priority if job.state == "queued" else ""
    lease = job.lease_expires_at if job.lease_expires_at is not None else ""
    ended = job.finished_at if job.finished_at is not None else ""
    events = [to_json([type_, now, data]) for type_, data in step.events]
    return [read, secrets.token_hex(8), job.id, _text(job), waiting, lease, ended, job.idempotency_key or "", *events]


def _outrun() -> Unavailable:
    return Unavailable(f"other writers of the job store were faster {MAX_TRIES} times", code="store_unavailable")
