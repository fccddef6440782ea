"""Jobs in Redis, for several machines: any number of servers and workers share one queue.

A change reads a job with its stamp, asks `lifecycle` what becomes of it, and writes job, events and indexes by a script
that refuses when the stamp has moved, in which case it starts again: see `redis_scripts`.

What is accepted is as durable as that Redis: give it an append-only file, and `maxmemory-policy noeviction`. Leases are
told by the clocks of those who claim; clocks that disagree move a lease, and the fencing of attempts still holds.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Final, NamedTuple, cast

from server.errors import BadRequest, NotFound, Unavailable
from server.storage.redis import answering, connect

from . import lifecycle, redis_scripts
from .job import STATES, Event, Job, State, is_id, new_id, to_json
from .lifecycle import Step
from .stepwise import StepwiseJobStore
from .store import Events, Jobs

MAX_TRIES: Final = 1000  # changes lost to faster writers before giving up; one of them always wins
BATCH: Final = 100  # jobs that one listing script reads: Redis does nothing else meanwhile


class _StoredJob(NamedTuple):
    """A job as it is written down, and the stamp it had then."""

    job: Job
    stamp: str


class RedisJobStore(StepwiseJobStore):
    """The job store over a Redis server (6.2 or newer, not a cluster: a change touches several keys).

    Raises `ValueError` for a URL of another form. `now` gives seconds since the epoch.
    """

    # {0} is the prefix. Indexes are sorted sets of job ids.
    JOB = "{0}:jobs:job:{1}"  # hash: the job as JSON, its stamp
    EVENTS = "{0}:jobs:events:{1}"  # list of [type, at, data]; the place in it is the event's number
    WAITING = "{0}:jobs:waiting"  # the queue: -priority, then age
    LEASES = "{0}:jobs:leases"  # running jobs by the end of their lease
    FINISHED = "{0}:jobs:finished"  # by the time they finished
    STATE = "{0}:jobs:state:{1}"  # this and the next three by age
    TASK = "{0}:jobs:task:{1}"
    TENANT = "{0}:jobs:tenant:{1}"
    ALL = "{0}:jobs:all"
    NEWEST = "{0}:jobs:newest"  # the last id given; outlives its job
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

    # --- asking -------------------------------------------------------------------------------------------------------

    def _add(self, asked: Job) -> Job:
        for _ in range(MAX_TRIES):
            newest, known = self._before_submit(asked.tenant, asked.idempotency_key)
            if known:
                return lifecycle.resubmitted(known, asked)
            now = self._now()
            job = replace(asked, id=new_id(now, after=newest), created_at=now)
            if self._submitted(newest, lifecycle.submitted(job), now):
                return job
        raise _outrun()

    def get(self, job_id: str) -> Job:
        return self._read(job_id).job

    def list(
        self,
        *,
        task: str | None = None,
        state: State | None = None,
        cursor: str | None = None,
        limit: int = 50,
        tenant: str | None = None,
        task_prefix: str = "",
    ) -> tuple[Jobs, str | None]:
        if cursor is not None and not is_id(cursor):
            raise BadRequest("expected the cursor of an earlier page, got something else")
        asked = {"task": task, "state": state, "tenant": tenant}
        wanted = {name: value for name, value in asked.items() if value is not None}
        found = self._newest_first(self._narrowest(wanted), cursor)
        covered = (job for job in found if job.task.startswith(task_prefix))
        matching = (job for job in covered if all(getattr(job, name) == value for name, value in wanted.items()))
        jobs = [*islice(matching, limit + 1)]
        page = jobs[:limit]
        return page, page[-1].id if page and len(jobs) > limit else None

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> Events:
        first, texts = max(after, 0), []
        if limit > 0 and is_id(job_id):
            with answering("job store"):
                texts = self._redis.lrange(self._key(self.EVENTS, job_id), first, first + limit - 1)
        if not texts:
            self.get(job_id)
        return [Event(seq, *json.loads(text)) for seq, text in enumerate(texts, start=first + 1)]

    def counts(self) -> dict[State, int]:
        with answering("job store"), self._redis.pipeline(transaction=True) as pipe:
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
        with answering("job store"):
            ids = sorted(map(str, self._redis.zrangebyscore(self._key(self.FINISHED), "-inf", f"({before!r}")))
        old = [kept.job for job_id in ids if (kept := self._find(job_id))]
        return [job for job in old if self._forgotten(job)]

    def close(self) -> None:
        self._redis.close()

    # --- one job ------------------------------------------------------------------------------------------------------

    def _key(self, template: str, part: str = "") -> str:
        return template.format(self._prefix, part)

    def _find(self, job_id: str) -> _StoredJob | None:
        with answering("job store"):
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
        with answering("job store"):
            return int(self._change_script(self._keys(kept.job, step.job), _arguments(kept.stamp, step, now)))

    def _keys(self, before: Job, after: Job) -> tuple[str, ...]:
        own = (self._key(self.JOB, after.id), self._key(self.EVENTS, after.id))
        queues = (self._key(self.WAITING), self._key(self.LEASES), self._key(self.FINISHED))
        return *own, *queues, self._key(self.STATE, before.state), self._key(self.STATE, after.state)

    def _next(self, now: float) -> _StoredJob | None:
        """The waiting job whose turn it is."""
        with answering("job store"):
            rows = self._next_script([self._key(self.WAITING), self._key(self.LEASES)], [now, self._key(self.JOB)])
        waiting = [kept for row in rows if (kept := _kept(*row))]
        return min(waiting, key=lambda kept: (-kept.job.priority, kept.job.id), default=None)

    # --- coming and going ---------------------------------------------------------------------------------------------

    def _before_submit(self, tenant: str, key: str | None) -> tuple[str | None, Job | None]:
        """The newest id so far, and the job that the idempotency key stands for.

        In this order: whoever uses the key later has moved the newest id, and our submission is refused.
        """
        with answering("job store"):
            newest = _str(self._redis.get(self._key(self.NEWEST)))
            known = _str(self._redis.hget(self._key(self.KEYS, tenant), key)) if key is not None else None
        kept = self._find(known) if known else None
        return newest, kept.job if kept else None

    def _submitted(self, newest: str | None, step: Step, now: float) -> bool:
        job = step.job
        keys = [*self._keys(job, job), self._key(self.NEWEST), *self._by_age(job)]
        if job.idempotency_key is not None:
            keys.append(self._key(self.KEYS, job.tenant))
        with answering("job store"):
            return bool(self._submit_script(keys, _arguments(newest or "", step, now)))

    def _by_age(self, job: Job) -> tuple[str, str, str]:
        return self._key(self.ALL), self._key(self.TASK, job.task), self._key(self.TENANT, job.tenant)

    def _forgotten(self, job: Job) -> bool:
        own = [self._key(self.JOB, job.id), self._key(self.EVENTS, job.id), self._key(self.KEYS, job.tenant)]
        indexes = [*self._by_age(job), self._key(self.FINISHED), self._key(self.STATE, job.state)]
        with answering("job store"):
            return bool(self._forget_script(own + indexes, [job.id, job.idempotency_key or ""]))

    # --- listing ------------------------------------------------------------------------------------------------------

    def _narrowest(self, wanted: Mapping[str, str]) -> str:
        """The shortest index that holds every job that is wanted."""
        templates = {"task": self.TASK, "state": self.STATE, "tenant": self.TENANT}
        indexes = [self._key(templates[name], value) for name, value in wanted.items()] or [self._key(self.ALL)]
        if len(indexes) == 1:
            return indexes[0]
        with answering("job store"):
            return min(indexes, key=self._redis.zcard)

    def _newest_first(self, index: str, cursor: str | None) -> Iterator[Job]:
        below = f"({cursor}" if cursor else "+"
        while True:
            with answering("job store"):
                texts = self._page_script([index], [below, BATCH, self._key(self.JOB)])
            jobs = [_job(text) for text in texts]
            yield from jobs
            if len(jobs) < BATCH:
                return
            below = f"({jobs[-1].id}"


# --- records ----------------------------------------------------------------------------------------------------------


def _str(value: str | bytes | None) -> str | None:
    """The client decodes what it answers; its types do not know that."""
    return cast("str | None", value)


def _text(job: Job) -> str:
    return to_json(asdict(job))


def _job(text: str) -> Job:
    return Job(**json.loads(text))


def _kept(text: str | None, stamp: str | None) -> _StoredJob | None:
    return _StoredJob(_job(text), stamp) if text is not None and stamp is not None else None


def _arguments(read: str, step: Step, now: float) -> list[str | float]:
    """What a script wants to know: see `redis_scripts`."""
    job = step.job
    waiting: str | float = -job.priority if job.state == "queued" else ""
    lease = job.lease_expires_at if job.lease_expires_at is not None else ""
    ended = job.finished_at if job.finished_at is not None else ""
    events = [to_json([type_, now, data]) for type_, data in step.events]
    return [read, secrets.token_hex(8), job.id, _text(job), waiting, lease, ended, job.idempotency_key or "", *events]


def _outrun() -> Unavailable:
    return Unavailable(f"other writers of the job store were faster {MAX_TRIES} times", code="store_unavailable")
