"""From what a client names to a seat on the rack.

    "cats@live" ─▶ which version?   alias, digest or prefix; a canary by the request's key
        version ─▶ its seat         on the rack already, or loaded once for everybody who asks; pinned
                     └ cannot be loaded ─▶ quarantined; an alias is answered by where it pointed before

Whoever asks for a version by its own name gets that version or the reason why not. Whoever asks for an alias wants an
answer: a damaged bundle, one for another backbone, a store that is away just then cost nobody the version before it.
The answer names the version that gave it, as all answers do.
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
MOST_TRIED: Final = 4  # earlier versions, before the request is told why its own could not be loaded
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{8,63}")


class Catalogue(Protocol):
    """What a prediction asks of the store."""

    def aliases(self, task: str) -> Mapping[str, Alias]: ...
    def versions(self, task: str) -> Sequence[VersionInfo]: ...
    def history(self, task: str, alias: str) -> Sequence[Alias]: ...


def task_name(text: str) -> str:
    """The name of a task, without a version. Raises BadRequest (bad_task_name)."""
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
        """`task` or `task@name`. Raises BadRequest (bad_task_name), also for an ensemble."""
        refs = cls.parse_all(text)
        if len(refs) > 1:
            raise BadRequest(f"expected one version of a task, got {text[:100]!r}", code="bad_task_name")
        return refs[0]

    @classmethod
    def parse_all(cls, text: str) -> Refs:
        """`task`, `task@name` or `task@name+name`. A plus sign that a query has turned into a blank is one, too: no
        name holds either. Raises BadRequest (bad_task_name)."""
        task, at, versions = text.partition("@")
        each = re.split("[+ ]", versions) if at else ["live"]
        if not names.is_task(task) or not all(each):
            raise _bad_task_name(text)
        return tuple(cls(task, name) for name in each)

    @classmethod
    def parse_each(cls, texts: Iterable[str]) -> dict[str, Refs]:
        """Several texts as `parse_all` reads them, by the text; each text once. Raises BadRequest (bad_task_name)."""
        return {text.replace(" ", ENSEMBLE_SIGN): cls.parse_all(text) for text in texts}

    @property
    def is_version(self) -> bool:
        return _DIGEST.fullmatch(self.name) is not None


Refs = tuple[Ref, ...]  # versions of one task: one, or the members of an ensemble


class Resolver:
    """Resolves references and takes seats. Belongs to the event loop."""

    def __init__(self, store: Catalogue, residency: Residency, quarantine: Quarantine) -> None:
        self._store, self._residency, self._quarantine = store, residency, quarantine
        self._last: dict[Ref, str] = {}  # what an alias was last answered by

    def within(self, store: Catalogue, residency: Residency) -> Resolver:
        """The same as who may see only a part of store and rack is to have it."""
        narrowed = copy.copy(self)
        narrowed._store, narrowed._residency = store, residency
        return narrowed

    async def take(self, ref: Ref, key: str) -> tuple[str, Any]:
        """The version that answers, and its pinned seat. Raises what `resolve`, the store and the loader raise."""
        version, by_alias = await self._resolve(ref, key)
        try:
            return await self._taken(ref, version, by_alias)
        except VersionNotFound:
            if ref.is_version:
                raise
        except TaskNotFound:
            raise
        except Exception as error:
            if not by_alias:
                raise
            return await self._earlier(ref, key, version, error)
        # the alias moved on and the version was deleted between the two steps: ask once more
        version, by_alias = await self._resolve(ref, key)
        return await self._taken(ref, version, by_alias)

    def release(self, seat: Any) -> None:
        self._residency.release(seat)

    async def resolve(self, ref: Ref, key: str) -> str:
        """The version that should answer.

        Raises TaskNotFound, AliasNotFound, VersionNotFound, BadRequest (ambiguous_version).
        """
        return (await self._resolve(ref, key))[0]

    async def version_like(self, task: str, text: str) -> str:
        """A version by its digest, which may not exist, or by its unique beginning of at least 8 digits, which does.

        Raises TaskNotFound, VersionNotFound, BadRequest (ambiguous_version).
        """
        if _DIGEST.fullmatch(text):
            return text
        if not _PREFIX.fullmatch(text):
            raise VersionNotFound(task, text)
        infos = await asyncio.to_thread(self._store.versions, task)
        found = [info.version for info in infos if info.version.startswith(text)]
        if not found:
            raise VersionNotFound(task, text)
        if len(found) > 1:
            raise BadRequest(
                f"expected the beginning of one version, got {text!r}, with which {len(found)} versions begin",
                code="ambiguous_version",
            )
        return found[0]

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
        """From memory where the store remembers them; otherwise in a thread, for a store may touch a disk or a wire."""
        known: Callable[[str], Mapping[str, Alias] | None] | None = getattr(self._store, "known_aliases", None)
        aliases = known(task) if known is not None else None
        return aliases if aliases is not None else await asyncio.to_thread(self._store.aliases, task)

    async def _taken(self, ref: Ref, version: str, by_alias: bool) -> tuple[str, Any]:
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
            self._last[ref] = version
        return version, seat

    async def _earlier(self, ref: Ref, key: str, failed: str, error: Exception) -> tuple[str, Any]:
        """Who answers for an alias whose version cannot be loaded. Raises `error` where nobody can."""
        for version in await self._candidates(ref, key, failed):
            try:
                return await self._taken(ref, version, by_alias=True)
            except Exception:  # it has been told of; what the caller is told is why its own failed
                continue
        raise error

    async def _candidates(self, ref: Ref, key: str, failed: str) -> list[str]:
        """Other targets of the alias, then where it pointed before; without the store, what answered last."""
        try:
            states = await asyncio.to_thread(self._store.history, ref.task, ref.name)
        except StoreError:
            last = self._last.get(ref)
            return [last] if last is not None and last != failed else []
        versions = dict.fromkeys(version for state in reversed(states) for version in _in_order(state, key))
        return [version for version in versions if version != failed][:MOST_TRIED]


def _unrelated_to_version(error: Exception) -> bool:
    """Whether a version might be whole although loading it failed so."""
    return isinstance(error, StoreUnavailable) or getattr(error, "code", "") == "engine_unavailable"


def _in_order(state: Alias, key: str) -> Iterable[str]:
    """The one that the key chooses, then the others, the heaviest first."""
    others = sorted(state.targets, key=lambda target: -target.weight)
    return (state.choose(key), *(target.version for target in others))
