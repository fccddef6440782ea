"""Aliases: what a name points at, how a request chooses, and the one set of rules by which they change.

Every backend loads an `AliasBook`, lets it change, and stores it again atomically, so all of them have the same rules.
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
    shown,
)
from prompts_store.names import ALIAS, is_alias

MAX_HISTORY: Final = 100
MAX_TARGETS: Final = 16


class _Any(enum.Enum):
    ANY = "any"


ANY: Final = _Any.ANY
Expect = int | None | Literal[_Any.ANY]
"""What a compare-and-set wants to find: a revision, None for no such alias, or ANY."""


@dataclass(frozen=True)
class Target:
    """A version and its share of the requests; the shares of an alias add up to 1."""

    version: str
    weight: float = 1.0


Targets = str | Mapping[str, float] | Iterable[Target]
"""One version, weights by version, or targets."""


@dataclass(frozen=True)
class Alias:
    """Where an alias points. `revision` grows with every change and is never used twice; `changed_at` in seconds."""

    name: str
    targets: tuple[Target, ...]
    revision: int
    changed_at: float

    @property
    def heaviest(self) -> str:
        """The version with the largest share of the requests; the first of several with the same share."""
        return max(self.targets, key=lambda target: target.weight).version

    def choose(self, key: str) -> str:
        """The version that answers requests with this key: always the same, with shares as the weights say.

        Weighted rendezvous hashing: when weights move, only the keys that must change version do.
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
    """All that is known of one alias. An empty history: deleted, kept so that no revision is given out twice."""

    revision: int = 0
    history: list[Alias] = field(default_factory=list)

    @property
    def current(self) -> Alias | None:
        return self.history[-1] if self.history else None


class AliasBook:
    """Every alias of one task, with history. Not thread-safe: a store loads, changes and saves it atomically."""

    def __init__(self, task: str, records: dict[str, _Record] | None = None) -> None:
        self._task = task
        self._records = records or {}

    def current(self) -> dict[str, Alias]:
        return {name: record.history[-1] for name, record in sorted(self._records.items()) if record.history}

    def history(self, alias: str) -> list[Alias]:
        """Oldest first; the last one is current."""
        return list(self._existing(alias).history)

    def users_of(self, version: str) -> list[str]:
        return [name for name, alias in self.current().items() if version in {t.version for t in alias.targets}]

    def set(self, alias: str, targets: Targets, *, expect: Expect, versions: Collection[str], now: float) -> Alias:
        if not is_alias(alias):
            raise BadAlias(f"expected an alias name like {ALIAS.pattern}, got {shown(alias)}")
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
        """Point where it pointed before. Earlier targets of which a version is gone are passed over."""
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
        """Readable by a person; empty when there is nothing to remember."""
        if not self._records:
            return ""
        return json.dumps({name: asdict(record) for name, record in sorted(self._records.items())}, indent=1) + "\n"

    @classmethod
    def from_json(cls, task: str, text: str | bytes) -> AliasBook:
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
    """Targets with shares that add up to 1, in the order given."""
    if isinstance(targets, str):
        return (Target(targets),)
    given = [Target(*pair) for pair in targets.items()] if isinstance(targets, Mapping) else list(targets)
    if not 1 <= len(given) <= MAX_TARGETS:
        raise BadAlias(f"expected 1 to {MAX_TARGETS} targets, got {len(given)}")
    if len({target.version for target in given}) != len(given):
        raise BadAlias("expected every version once, got one twice")
    total = math.fsum(_weight(target) for target in given)
    return tuple(Target(target.version, target.weight / total) for target in given)


def _weight(target: Target) -> float:
    if not isinstance(target.weight, int | float) or not 1e-9 <= target.weight <= 1e9:
        raise BadAlias(f"expected weights from 1e-9 to 1e9, got {shown(target.weight)}")
    return target.weight
