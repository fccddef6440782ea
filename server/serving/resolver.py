"""From a reference to a seat on the rack.

    "cats@live" ─▶ which version?   alias, digest or prefix; a canary by the request's key
        version ─▶ its seat         resident already, or loaded once for all requests that wait for it; pinned
                     └ cannot be loaded ─▶ quarantined; an alias falls back to the version it pointed at before

A reference to a version gets that version or the reason why not. A reference to an alias falls back: while its version
is damaged, fitted on another backbone or cannot be fetched from the store, the version before it answers. The answer
names the version that gave it, as all answers do.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from prompts_store import (
    Alias,
    AliasNotFound,
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
        self._last_answered: dict[Ref, str] = {}  # the version that answered for an alias last

    def scoped(self, store: Catalogue, residency: Residency) -> Resolver:
        """A copy restricted to one tenant's store and rack."""
        scoped = copy.copy(self)
        scoped._store, scoped._residency = store, residency
        return scoped

    async def acquire(self, ref: Ref, key: str) -> tuple[str, Any]:
        """Return the version that answers, and its pinned seat; `release` gives the seat back.

        Raises what `resolve`, the store and the loader raise.
        """
        version, by_alias = await self._resolve(ref, key)
        try:
            return await self._acquire_version(ref, version, by_alias)
        except VersionNotFound:
            if ref.is_version:
                raise
        except TaskNotFound:
            raise
        except Exception as error:
            if not by_alias:
                raise
            return await self._fall_back(ref, key, version, error)
        # the alias moved on and the version was deleted between the two steps: resolve once more
        version, by_alias = await self._resolve(ref, key)
        return await self._acquire_version(ref, version, by_alias)

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

    async def _resolve(self, ref: Ref, key: str) -> tuple[str, bool]:
        """The version, and whether an alias named it."""
        if ref.is_version:
            return ref.name, False
        alias = (await self._aliases(ref.task)).get(ref.name)
        if alias is not None:
            return alias.choose(key), True
        if _PREFIX.fullmatch(ref.name):
            return await self.version_like(ref.task, ref.name), False
        raise AliasNotFound(ref.task, ref.name)

    async def _aliases(self, task: str) -> Mapping[str, Alias]:
        """From the store's cache; else in a thread, as reading may wait for a disk or the network."""
        known: Callable[[str], Mapping[str, Alias] | None] | None = getattr(self._store, "known_aliases", None)
        aliases = known(task) if known is not None else None
        return aliases if aliases is not None else await asyncio.to_thread(self._store.aliases, task)

    async def _acquire_version(self, ref: Ref, version: str, by_alias: bool) -> tuple[str, Any]:
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
        if by_alias:
            self._last_answered[ref] = version
        return version, seat

    async def _fall_back(self, ref: Ref, key: str, failed: str, error: Exception) -> tuple[str, Any]:
        """A version that can answer in place of `failed`. Raises `error` where there is none."""
        for version in await self._fallbacks(ref, key, failed):
            try:
                return await self._acquire_version(ref, version, by_alias=True)
            except Exception:  # logged by the quarantine; the caller gets the error of its own version
                continue
        raise error

    async def _fallbacks(self, ref: Ref, key: str, failed: str) -> list[str]:
        """Other targets of the alias, then its earlier targets; while the store is away, what answered last."""
        try:
            states = await asyncio.to_thread(self._store.history, ref.task, ref.name)
        except StoreError:
            last = self._last_answered.get(ref)
            return [last] if last is not None and last != failed else []
        versions = dict.fromkeys(version for state in reversed(states) for version in _by_preference(state, key))
        return [version for version in versions if version != failed][:MAX_FALLBACKS]


def _unrelated_to_version(error: Exception) -> bool:
    """Whether loading failed for a reason that says nothing about the version."""
    return isinstance(error, StoreUnavailable) or getattr(error, "code", "") == "engine_unavailable"


def _by_preference(state: Alias, key: str) -> Iterable[str]:
    """The target that the key chooses, then the others, the heaviest first."""
    others = sorted(state.targets, key=lambda target: -target.weight)
    return (state.choose(key), *(target.version for target in others))
