"""A job: one training request, its states and its events.

queued ──claim──▶ running ──finish──▶ succeeded | failed | cancelled
  ▲ │                │
  │ └─cancel──▶ cancelled
  └──release, retry──┘          running ──lease expired, claimed again──▶ running
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]

Publish = Literal["always", "if_better", "never"]

STATES: Final[tuple[State, ...]] = get_args(State)
FINISHED: Final[frozenset[State]] = frozenset({"succeeded", "failed", "cancelled"})
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"running", "queued", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One training request. Times are seconds since the epoch.

    `attempt` is the fencing number: 0 before the first claim, one more at each claim. `failures` counts the attempts
    that failed or lost their lease, but not those that were released; at `max_attempts` the job fails. `error` is
    `{"code", "detail"}`: why the job failed, or why its latest attempt did. `publish`: whether the new version goes
    live always, if it is better than the live version, or never.
    """

    id: str
    task: str
    dataset: str
    method: str
    recipe: dict[str, Any]
    max_attempts: int
    created_at: float
    state: State = "queued"
    attempt: int = 0
    failures: int = 0
    priority: int = 0
    publish: Publish = "always"
    tenant: str = ""
    idempotency_key: str | None = None
    worker: str | None = None
    lease_expires_at: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    version: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    cancel_requested: bool = False
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    def lease_expired(self, now: float) -> bool:
        return self.state == "running" and (self.lease_expires_at or 0.0) <= now


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a job. `seq` counts from 1 without gaps.

    The store writes queued, started, retried, cancel_requested and the three final states; a worker adds others.
    """

    seq: int
    type: str
    at: float
    data: dict[str, Any]


# --- ids --------------------------------------------------------------------------------------------------------------

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32, in the order that text sorts
_ID: Final = re.compile(f"job_[0-7][{_ALPHABET}]{{25}}")


def new_id(now: float, after: str | None = None) -> str:
    """A new id that sorts by time, after the id `after`: 48 bits of milliseconds and 80 random bits.

    With the newest id as `after`, ids keep the order of submission within a millisecond and when a clock is set back.
    """
    number = (int(now * 1000) & (2**48 - 1)) << 80 | secrets.randbits(80)
    if after is not None and number <= (last := _number(after)):
        number = last + 1 + secrets.randbits(32)
    return "job_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def _number(job_id: str) -> int:
    number = 0
    for letter in job_id.removeprefix("job_"):
        number = number << 5 | _ALPHABET.index(letter)
    return number


# --- JSON -------------------------------------------------------------------------------------------------------------


def to_json(value: object) -> str:
    """Canonical JSON. NaN and the infinities, which a loss may be and JSON cannot express, become null."""
    return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
