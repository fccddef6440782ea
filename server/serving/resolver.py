"""From a reference to a seat on the rack.

    "cats@live" ─▶ which version?   alias, digest or prefix; a canary by the request's key
        version ─▶ its seat         resident already, or loaded once for all requests that wait for it; pinned
                     └ cannot be loaded ─▶ quarantined; an alias falls back to the version it pointed at before

A reference to a version gets that version or the reason why not. A reference to an alias falls back: while its version
is damaged or fitted on another backbone, the alias' other targets and the versions before it answer; while its version
cannot be fetched from the store, only the alias' other targets, as what was replaced must not come back in an outage.
A version from which the alias was rolled back never answers for it. The answer names the version that gave it.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from prompts_store import (
    Alias,
    AliasNotFound,
    KnownStale,
    StoreError,
    StoreUnavailable,
    TaskNotFound,
    VersionInfo,
    VersionNotFound,
    names,
)
from server.errors import BadRequest

from .quarantine import Quarantine
from .residency import Residency

T = TypeVar("T")
ENSEMBLE_SIGN = "+"  # between the versions of an ensemble
MAX_FALLBACKS: Final = 4  # earlier versions that are tried before the request fails
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{8,63}")


class Catalogue(Protocol):
    """The part of a store that predictions read."""

    def aliases(self, task: str) -> Mapping[str, Alias]: ...
    def versions(self, task: str) -> Sequence[VersionInfo]: ...
    def history(self, task: str, alias: str) -> Sequence[Alias]: ...


def task_name(text: str) -> str:
    """Return a task's name, which may name no version. Raises BadRequest (bad_task_name)."""
    if not names.is_task(text):
        raise _bad_task_name(text)
    return text


def _bad_task_name(text: str) -> BadRequest:
    return BadRequest(
        f"expected a task name like {names.TASK.pattern}, where a version may be named followed by @alias or @version, "
        f"several of them with + between, got {text[:100]!r}",
        code="bad_task_name",
    )


@dataclass(frozen=True)
class Ref:
    """A task, and an alias, a version or the beginning of one. Parsed once, where a request comes in."""

    task: str
    name: str = "live"

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Parse `task` or `task@name`. Raises BadRequest (bad_task_name), also for an ensemble."""
        refs = cls.parse_all(text)
        if len(refs) > 1:
            raise BadRequest(f"expected one version of a task, got {text[:100]!r}", code="bad_task_name")
        return refs[0]

    @classmethod
    def parse_all(cls, text: str) -> Refs:
        """Parse `task`, `task@name` or `task@name+name`. Raises BadRequest (bad_task_name).

        A blank separates like a plus sign, which a query's decoding turns into one; no name holds either.
        """
        task, at, versions = text.partition("@")
        each = re.split("[+ ]", versions) if at else ["live"]
        if not names.is_task(task) or not all(each):
            raise _bad_task_name(text)
        return tuple(cls(task, name) for name in each)

    @classmethod
    def parse_each(cls, texts: Iterable[str]) -> dict[str, Refs]:
        """Parse several texts; return the references by text. Raises BadRequest (bad_task_name)."""
        return {text.replace(" ", ENSEMBLE_SIGN): cls.parse_all(text) for text in texts}

    @property
    def is_version(self) -> bool:
        return _DIGEST.fullmatch(self.name) is not None


Refs = tuple[Ref, ...]  # versions of one task: one, or the members of an ensemble


class Resolver:
    """Resolves references and acquires seats. Belongs to the event loop."""

    def __init__(self, store: Catalogue, residency: Residency, quarantine: Quarantine) -> None:
        self._store, self._residency, self._quarantine = store, residency, quarantine

    def scoped(self, store: Catalogue, residency: Residency) -> Resolver:
        """A copy restricted to one tenant's store and rack."""
        scoped = copy.copy(self)
        scoped._store, scoped._residency = store, residency
        return scoped

    async def acquire(self, ref: Ref, key: str) -> tuple[str, Any]:
        """Return the version that answers, and its pinned seat; `release` gives the seat back.

        Raises what `resolve`, the store and the loader raise.
        """
        version, alias = await self._resolve(ref, key)
        try:
            return await self._acquire_version(ref, version)
        except VersionNotFound:
            if ref.is_version:
                raise
        except TaskNotFound:
            raise
        except Exception as error:
            if alias is None:
                raise
            return await self._fall_back(ref, key, alias, version, error)
        # the alias moved on and the version was deleted between the two steps: resolve once more
        version, _ = await self._resolve(ref, key)
        return await self._acquire_version(ref, version)

    def release(self, seat: Any) -> None:
        self._residency.release(seat)

    async def resolve(self, ref: Ref, key: str) -> str:
        """Return the version that should answer.

        Raises TaskNotFound, AliasNotFound, VersionNotFound, BadRequest (ambiguous_version).
        """
        return (await self._resolve(ref, key))[0]

    async def version_like(self, task: str, text: str) -> str:
        """Return a version by its digest, which may not exist, or by its unique beginning of at least 8 digits.

        Raises TaskNotFound, VersionNotFound, BadRequest (ambiguous_version).
        """
        if _DIGEST.fullmatch(text):
            return text
        if not _PREFIX.fullmatch(text):
            raise VersionNotFound(task, text)
        infos = await asyncio.to_thread(self._store.versions, task)
        candidates = [info.version for info in infos if info.version.startswith(text)]
        if not candidates:
            raise VersionNotFound(task, text)
        if len(candidates) > 1:
            raise BadRequest(
                f"expected the beginning of one version, got {text!r}, with which {len(candidates)} versions begin",
                code="ambiguous_version",
            )
        return candidates[0]

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _resolve(self, ref: Ref, key: str) -> tuple[str, Alias | None]:
        """The version, and the alias that named it."""
        if ref.is_version:
            await self._require_listed(ref)
            return ref.name, None
        alias = (await self._read(self._store.aliases, "known_aliases", ref.task)).get(ref.name)
        if alias is not None:
            return alias.choose(key), alias
        if _PREFIX.fullmatch(ref.name):
            return await self.version_like(ref.task, ref.name), None
        raise AliasNotFound(ref.task, ref.name)

    async def _require_listed(self, ref: Ref) -> None:
        """A version may have been deleted by another server and still be on the rack of this one."""
        try:
            infos = await self._read(self._store.versions, "known_versions", ref.task)
        except KnownStale:
            raise
        except StoreUnavailable:
            return  # nothing says that it is gone
        if not any(info.version == ref.name for info in infos):
            raise VersionNotFound(ref.task, ref.name)

    async def _read(self, read: Callable[[str], T], known: str, task: str) -> T:
        """From the store's cache, by its method `known`; else in a thread, as reading may wait for a disk or the
        network."""
        from_memory: Callable[[str], T | None] | None = getattr(self._store, known, None)
        value = from_memory(task) if from_memory is not None else None
        return value if value is not None else await asyncio.to_thread(read, task)

    async def _acquire_version(self, ref: Ref, version: str) -> tuple[str, Any]:
        self._quarantine.check(ref.task, version)
        try:
            seat = await self._residency.acquire(ref.task, version)
        except (VersionNotFound, TaskNotFound):
            self._quarantine.release(ref.task, version)
            raise
        except Exception as error:
            if not _unrelated_to_version(error):
                self._quarantine.put(ref.task, version, error)
            raise
        self._quarantine.release(ref.task, version)
        return version, seat

    async def _fall_back(self, ref: Ref, key: str, alias: Alias, failed: str, error: Exception) -> tuple[str, Any]:
        """A version that can answer in place of `failed`. Raises `error` where there is none."""
        earlier = [] if _unrelated_to_version(error) else await self._earlier(ref, failed)
        states = [alias, *earlier]
        versions = dict.fromkeys(version for state in states for version in _by_preference(state, key))
        for version in [version for version in versions if version != failed][:MAX_FALLBACKS]:
            try:
                return await self._acquire_version(ref, version)
            except Exception:  # logged by the quarantine; the caller gets the error of its own version
                continue
        raise error

    async def _earlier(self, ref: Ref, failed: str) -> list[Alias]:
        """The alias' states before `failed` was its target for the first time, the latest first.

        The states between that and now were replaced by going back to it.
        """
        try:
            states = await asyncio.to_thread(self._store.history, ref.task, ref.name)
        except StoreError:
            return []
        first = next((i for i, state in enumerate(states) if failed in _by_preference(state, "")), 0)
        return list(reversed(states[:first]))


def _unrelated_to_version(error: Exception) -> bool:
    """Whether loading failed for a reason that says nothing about the version."""
    return isinstance(error, StoreUnavailable) or getattr(error, "code", "") == "engine_unavailable"


def _by_preference(state: Alias, key: str) -> Iterable[str]:
    """The target that the key chooses, then the others, the heaviest first."""
    others = sorted(state.targets, key=lambda target: -target.weight)
    return (state.choose(key), *(target.version for target in others))
