"""Puts a job's bundle into the store, and moves the alias `live` as the job's policy says.

    always      `live` moves
    never       it does not
    if_better   the new and the live version are evaluated on the same validation pictures; `live` moves if the new one
                has the higher accuracy, or the same accuracy and the lower loss

A version goes live once: a later attempt at the same job, which makes the same bytes, does not move the alias again,
since it may have been moved meanwhile.
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
from server.training.evaluate import Score, UnservableBundle

from .heartbeat import Heartbeat

log = logging.getLogger(__name__)

LIVE: Final = "live"
RETRY_FOR_S: Final = 60.0
RETRY_EVERY_S: Final = 2.0
Evaluate = Callable[[Bundle], Score]
Outcome = dict[str, Any]


class Publisher:
    """Stores the bundles of jobs and moves `live`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def publish(self, job: Job, bundle: Bundle, evaluate: Evaluate, heartbeat: Heartbeat) -> Outcome:
        """Store the bundle, and move `live` where the policy says so. Returns what the job's metrics record:
        `published`, and under `judged` the scores behind the decision.

        An unavailable or full store is retried for `RETRY_FOR_S`, lest the work of hours be lost. Raises LeaseLost,
        StoreUnavailable.
        """
        until = time.monotonic() + RETRY_FOR_S
        while True:
            try:
                return self._publish(job, bundle, evaluate, heartbeat)
            except StoreUnavailable as error:
                if time.monotonic() >= until:
                    raise
                log.warning("job %s: %s; storing its version is tried again", job.id, error.detail)
                heartbeat.wait(RETRY_EVERY_S)

    def _publish(self, job: Job, bundle: Bundle, evaluate: Evaluate, heartbeat: Heartbeat) -> Outcome:
        """Idempotent. The beat before the alias moves is the fence: it raises LeaseLost in a superseded worker."""
        self._store.put(bundle)
        if self._went_live(bundle):
            return _published(bundle, heartbeat)
        if job.publish == "never":
            return _kept(bundle, heartbeat, "never")
        if job.publish == "if_better":
            return self._if_better(bundle, evaluate, heartbeat)
        heartbeat.beat()
        self._store.set_alias(job.task, LIVE, bundle.version)
        return _published(bundle, heartbeat)

    def _if_better(self, bundle: Bundle, evaluate: Evaluate, heartbeat: Heartbeat) -> Outcome:
        """Move `live` if the new version is better. Where `live` moves meanwhile, compare with its new version."""
        task, new = bundle.manifest.task, evaluate(bundle)
        while True:
            live = self._store.aliases(task).get(LIVE)
            scores: Outcome = {"new": asdict(new)}
            if live is not None and (old := self._score(task, live.heaviest, evaluate, heartbeat)):
                scores["live"] = {"version": live.heaviest, **asdict(old)}
                if not new.better_than(old):
                    return _kept(bundle, heartbeat, "not_better", scores)
            heartbeat.beat()
            try:
                self._store.set_alias(task, LIVE, bundle.version, expect=live.revision if live else None)
            except AliasConflict:
                log.info("task %s: live moved during the evaluation; evaluating the new live version", task)
                continue
            return _published(bundle, heartbeat, scores)

    def _score(self, task: str, version: str, evaluate: Evaluate, heartbeat: Heartbeat) -> Score | None:
        """The score of a stored version; None for one that cannot be served, because it is damaged or of another
        backbone: any version is better."""
        try:
            return evaluate(self._store.get(task, version))
        except (UnservableBundle, CorruptBundle, VersionNotFound) as error:
            heartbeat.emit("live_unusable", {"version": version, "code": error.code, "detail": error.detail})
            return None

    def _went_live(self, bundle: Bundle) -> bool:
        """Whether an earlier attempt at this job moved `live` already. No other job makes these bytes."""
        try:
            history = self._store.history(bundle.manifest.task, LIVE)
        except AliasNotFound:
            return False
        return any(target.version == bundle.version for state in history for target in state.targets)


def _published(bundle: Bundle, heartbeat: Heartbeat, scores: Outcome | None = None) -> Outcome:
    metrics = bundle.manifest.metrics
    figures = {
        "val_accuracy": metrics.get("val_accuracy"),
        "val_interval": metrics.get("val", {}).get("interval"),
        "val_images": metrics.get("val_images"),
    }
    about = {"version": bundle.version, "alias": LIVE, **_preliminary(bundle), **figures}
    heartbeat.emit("published", {**about, **(scores or {})})
    log.info("task %s: version %s is live%s", bundle.manifest.task, bundle.version[:12], _figures(bundle, scores))
    return {"published": True, **({"judged": scores} if scores else {})}


def _kept(bundle: Bundle, heartbeat: Heartbeat, reason: str, scores: Outcome | None = None) -> Outcome:
    heartbeat.emit("kept", {"version": bundle.version, "reason": reason, **_preliminary(bundle), **(scores or {})})
    how = "the job's policy is never" if reason == "never" else "it is not better than the live version"
    about = bundle.manifest.task, bundle.version[:12], how, _figures(bundle, scores)
    log.info("task %s: version %s is stored and not live, because %s%s", *about)
    return {"published": False, **({"judged": scores} if scores else {})}


def _preliminary(bundle: Bundle) -> Outcome:
    return {"preliminary": True} if bundle.manifest.metrics.get("preliminary") else {}


def _figures(bundle: Bundle, scores: Outcome | None) -> str:
    """For the log: the accuracy on the validation pictures, and the live version's on the same ones where both were
    evaluated."""
    metrics = bundle.manifest.metrics
    text = "; a preliminary head" if _preliminary(bundle) else ""
    if "val_accuracy" in metrics:
        text += f": validation accuracy {metrics['val_accuracy']:.1%} of {metrics['val_images']} pictures"
    if scores and "live" in scores:
        text += f", before {scores['live']['accuracy']:.1%}"
    return text
