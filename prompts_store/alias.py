"""Aliases: their targets, how a request's key chooses among these, and the rules by which aliases change.

Every backend loads an `AliasBook`, changes it and stores it again atomically, so all backends follow the same rules.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from prompts_store.errors import (
    AliasConflict,
    AliasNotFound,
    BadAlias,
    CorruptAliases,
    NoHistory,
    VersionNotFound,
    excerpt,
)
from prompts_store.names import ALIAS, is_alias

MAX_HISTORY: Final = 100
MAX_TARGETS: Final = 16


class _Any(enum.Enum):
    ANY = "any"


ANY: Final = _Any.ANY
Expect = int | None | Literal[_Any.ANY]
"""What compare-and-set expects: the current revision, None for an alias that does not exist, or ANY."""


@dataclass(frozen=True)
class Target:
    """A version and its share of the requests; the shares of an alias add up to 1."""

    version: str
    weight: float = 1.0


Targets = str | Mapping[str, float] | Iterable[Target]
"""One version, weights by version, or targets."""


@dataclass(frozen=True)
class Alias:
    """A name and its target versions.

    `revision` grows with every change and is never reused; `changed_at` is in seconds since the Unix epoch.
    """

    name: str
    targets: tuple[Target, ...]
    revision: int
    changed_at: float

    @property
    def heaviest(self) -> str:
        """The version with the largest share of the requests; the first of several with the same share."""
        return max(self.targets, key=lambda target: target.weight).version

    def choose(self, key: str) -> str:
        """Return the version that answers requests with this key: always the same one for the same weights.

        Weighted rendezvous hashing: over many keys the shares follow the weights, and when weights change, as few keys
        as possible change version.
        """
        if len(self.targets) == 1:
            return self.targets[0].version
        return max(self.targets, key=lambda target: (_score(target, key), target.version)).version


def _score(target: Target, key: str) -> float:
    digest = hashlib.sha256(f"{target.version}:{key}".encode("utf-8", "surrogatepass")).digest()
    uniform = (int.from_bytes(digest[:7], "big") + 0.5) / 2**56  # in (0, 1)
    return -target.weight / math.log(uniform)


@dataclass
class _Record:
    """An alias with its history. A deleted alias stays with an empty history, so that no revision is reused."""

    revision: int = 0
    history: list[Alias] = field(default_factory=list)

    @property
    def current(self) -> Alias | None:
        return self.history[-1] if self.history else None


class AliasBook:
    """The aliases of one task with their histories. Not thread-safe: stores load, change and save it atomically."""

    def __init__(self, task: str, records: dict[str, _Record] | None = None) -> None:
        self._task = task
        self._records = records or {}

    def current(self) -> dict[str, Alias]:
        """Return the aliases that exist, sorted by name."""
        return {name: record.history[-1] for name, record in sorted(self._records.items()) if record.history}

    def history(self, alias: str) -> list[Alias]:
        """Return an alias' states, oldest first; the last one is current. Raises AliasNotFound."""
        return list(self._existing(alias).history)

    def users_of(self, version: str) -> list[str]:
        """Return the names of the aliases that have `version` among their targets."""
        return [name for name, alias in self.current().items() if version in {t.version for t in alias.targets}]

    def set(self, alias: str, targets: Targets, *, expect: Expect, versions: Collection[str], now: float) -> Alias:
        """Set an alias' targets. Raises BadAlias, AliasConflict, and VersionNotFound for a target not in `versions`."""
        if not is_alias(alias):
            raise BadAlias(f"expected an alias name like {ALIAS.pattern}, got {excerpt(alias)}")
        shares = _normalised(targets)
        self._compare(alias, expect)
        for target in shares:
            if target.version not in versions:
                raise VersionNotFound(self._task, target.version)
        return self._append(alias, shares, now)

    def delete(self, alias: str, *, expect: Expect) -> None:
        self._compare(alias, expect)
        self._existing(alias).history.clear()

    def clear(self) -> None:
        for record in self._records.values():
            record.history.clear()

    def rollback(self, alias: str, *, expect: Expect, versions: Collection[str], now: float) -> Alias:
        """Restore the last different targets whose versions all still exist.

        Raises AliasNotFound, AliasConflict, NoHistory.
        """
        self._compare(alias, expect)
        *earlier, current = self._existing(alias).history
        for entry in reversed(earlier):
            if entry.targets != current.targets and all(t.version in versions for t in entry.targets):
                return self._append(alias, entry.targets, now)
        raise NoHistory(self._task, alias)

    def _existing(self, alias: str) -> _Record:
        record = self._records.get(alias)
        if record is None or record.current is None:
            raise AliasNotFound(self._task, alias)
        return record

    def _compare(self, alias: str, expect: Expect) -> None:
        record = self._records.get(alias)
        actual = record.current.revision if record and record.current else None
        if expect is not ANY and expect != actual:
            raise AliasConflict(expect, actual)

    def _append(self, alias: str, targets: tuple[Target, ...], now: float) -> Alias:
        record = self._records.setdefault(alias, _Record())
        record.revision += 1
        entry = Alias(alias, targets, record.revision, now)
        record.history = [*record.history, entry][-MAX_HISTORY:]
        return entry

    # --- as JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return indented JSON; an empty string for a task that never had an alias."""
        if not self._records:
            return ""
        return json.dumps({name: asdict(record) for name, record in sorted(self._records.items())}, indent=1) + "\n"

    @classmethod
    def from_json(cls, task: str, text: str | bytes) -> AliasBook:
        """Read what `to_json` wrote. Raises CorruptAliases."""
        try:
            records = {name: _record(value) for name, value in json.loads(text or "{}").items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptAliases(f"task {task}: expected stored aliases, got {type(error).__name__}") from error
        return cls(task, records)


def _record(value: dict[str, Any]) -> _Record:
    return _Record(int(value["revision"]), [_alias(entry) for entry in value["history"]])


def _alias(value: dict[str, Any]) -> Alias:
    targets = tuple(Target(str(t["version"]), float(t["weight"])) for t in value["targets"])
    return Alias(str(value["name"]), targets, int(value["revision"]), float(value["changed_at"]))


def _normalised(targets: Targets) -> tuple[Target, ...]:
    """Return the targets with weights scaled to add up to 1, in the same order. Raises BadAlias."""
    if isinstance(targets, str):
        return (Target(targets),)
    shares = [Target(*pair) for pair in targets.items()] if isinstance(targets, Mapping) else list(targets)
    if not 1 <= len(shares) <= MAX_TARGETS:
        raise BadAlias(f"expected 1 to {MAX_TARGETS} targets, got {len(shares)}")
    if len({target.version for target in shares}) != len(shares):
        raise BadAlias("expected every version once, got one twice")
    total = math.fsum(_weight(target) for target in shares)
    return tuple(Target(target.version, target.weight / total) for target in shares)


def _weight(target: Target) -> float:
    if not isinstance(target.weight, int | float) or not 1e-9 <= target.weight <= 1e9:
        raise BadAlias(f"expected weights from 1e-9 to 1e9, got {excerpt(target.weight)}")
    return target.weight
