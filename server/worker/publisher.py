"""From a bundle to what the server answers with: into the store, and live where the job's policy says so.

    always      `live` moves
    never       it does not
    if_better   the new version and the live one answer the same validation pictures; `live` moves if the new one is
                right more often, or as often and surer of it

A version goes live once: a later attempt at the same job, whose bytes are the same, leaves the alias to whoever moved
it since.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from prompts_store import (
    AliasConflict,
    AliasNotFound,
    Bundle,
    CorruptBundle,
    Store,
    StoreUnavailable,
    VersionNotFound,
)
from server.jobs.job import Job
from server.training.evaluate import Score, Unservable

from .heartbeat import Heartbeat

log = logging.getLogger(__name__)

LIVE: Final = "live"
PATIENCE_S: Final = 60.0
AGAIN_S: Final = 2.0
Evaluate = Callable[[Bundle], Score]
Outcome = dict[str, Any]


class Publisher:
    """Puts a job's bundle into the store and decides about `live`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, job: Job, bundle: Bundle, judge: Evaluate, pulse: Heartbeat) -> Outcome:
        """What the job's metrics say about it: `published`, and under `judged` the scores that decided.

        A store that is full or away is waited for: what took hours to fit must not be lost to a minute without it.
        Raises LeaseLost, StoreUnavailable.
        """
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._publish(job, bundle, judge, pulse)
            except StoreUnavailable as error:
                if time.monotonic() >= until:
                    raise
                log.warning("job %s: %s; its version is held meanwhile", job.id, error.detail)
                pulse.wait(AGAIN_S)

    def _publish(self, job: Job, bundle: Bundle, judge: Evaluate, pulse: Heartbeat) -> Outcome:
        """Any number of times. The beat before the alias moves is the fence that keeps a superseded worker out."""
        self._store.put(bundle)
        if self._went_live(bundle):
            return _published(bundle, pulse)
        if job.publish == "never":
            return _kept(bundle, pulse, "never")
        if job.publish == "if_better":
            return self._if_better(bundle, judge, pulse)
        pulse.beat()
        self._store.set_alias(job.task, LIVE, bundle.version)
        return _published(bundle, pulse)

    def _if_better(self, bundle: Bundle, judge: Evaluate, pulse: Heartbeat) -> Outcome:
        """Where somebody else moves `live` meanwhile, the new version has to be better than that one."""
        task, new = bundle.manifest.task, judge(bundle)
        while True:
            live = self._store.aliases(task).get(LIVE)
            judged: Outcome = {"new": asdict(new)}
            if live is not None and (old := self._score(task, live.heaviest, judge, pulse)):
                judged["live"] = {"version": live.heaviest, **asdict(old)}
                if not new.better_than(old):
                    return _kept(bundle, pulse, "not_better", judged)
            pulse.beat()
            try:
                self._store.set_alias(task, LIVE, bundle.version, expect=live.revision if live else None)
            except AliasConflict:
                log.info("task %s: live moved while its version was judged; judging the one that is live now", task)
                continue
            return _published(bundle, pulse, judged)

    def _score(self, task: str, version: str, judge: Evaluate, pulse: Heartbeat) -> Score | None:
        """None for a version that cannot be served here, fitted on another backbone or damaged: anything is better."""
        try:
            return judge(self._store.get(task, version))
        except (Unservable, CorruptBundle, VersionNotFound) as error:
            pulse.tell("live_unusable", {"version": version, "code": error.code, "detail": error.detail})
            return None

    def _went_live(self, bundle: Bundle) -> bool:
        """Whether an earlier attempt at this job has come so far. No other job makes these bytes."""
        try:
            history = self._store.history(bundle.manifest.task, LIVE)
        except AliasNotFound:
            return False
        return any(target.version == bundle.version for state in history for target in state.targets)


def _published(bundle: Bundle, pulse: Heartbeat, judged: Outcome | None = None) -> Outcome:
    early = {"preliminary": True} if bundle.manifest.metrics.get("preliminary") else {}
    pulse.tell("published", {"version": bundle.version, "alias": LIVE, **early, **(judged or {})})
    return {"published": True, **({"judged": judged} if judged else {})}


def _kept(bundle: Bundle, pulse: Heartbeat, reason: str, judged: Outcome | None = None) -> Outcome:
    pulse.tell("kept", {"version": bundle.version, "reason": reason, **(judged or {})})
    return {"published": False, **({"judged": judged} if judged else {})}
