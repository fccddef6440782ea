"""The store protocol that every backend implements; one contract suite tests them all.

A task exists while it has at least one version. A read sees a single moment; every change is atomic, and durable when
the call returns. A name that no task, version or alias can have is not found.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from prompts_store.alias import ANY, Alias, Expect, Targets
from prompts_store.bundle import Bundle
from prompts_store.manifest import Manifest


@dataclass(frozen=True)
class VersionInfo:
    """A version without its arrays: the size of its file and its manifest."""

    version: str
    bytes: int
    manifest: Manifest


@dataclass(frozen=True)
class Change:
    """The versions or aliases of `task` have changed: read them again."""

    task: str


def newest_first(infos: Iterable[VersionInfo]) -> list[VersionInfo]:
    return sorted(infos, key=lambda info: (-info.manifest.created_at, info.version))


class Store(Protocol):
    """Bundles by (task, version) and aliases by (task, name). Thread-safe; every call may raise StoreUnavailable."""

    def put(self, bundle: Bundle) -> str:
        """Store a bundle and return its version. Idempotent; moves no alias.

        Raises CorruptBundle when the bundle's version is not its digest.
        """

    def get(self, task: str, version: str) -> Bundle:
        """Return a bundle. Raises TaskNotFound, VersionNotFound, and CorruptBundle if its digest is not the version."""

    def tasks(self) -> list[str]:
        """Return the names of all tasks, sorted."""

    def versions(self, task: str) -> list[VersionInfo]:
        """Return the versions of a task, newest `created_at` first, ties by version. Raises TaskNotFound."""

    def aliases(self, task: str) -> dict[str, Alias]:
        """Return the aliases of a task by name, sorted. Raises TaskNotFound."""

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        """Set an alias if `expect` holds: the current revision, None for an alias that must not exist, or ANY.

        Weights are scaled to add up to 1. Raises TaskNotFound, VersionNotFound, BadAlias, AliasConflict.
        """

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        """Delete an alias. A later `set_alias` continues its revisions.

        Raises TaskNotFound, AliasNotFound, AliasConflict.
        """

    def history(self, task: str, alias: str) -> list[Alias]:
        """Return the last 100 states of an alias, oldest first. Raises TaskNotFound, AliasNotFound."""

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        """Restore the alias' previous targets as a new revision; a second rollback undoes the first.

        States with a deleted version are skipped. Raises TaskNotFound, AliasNotFound, AliasConflict, and NoHistory when
        no state is left.
        """

    def delete_version(self, task: str, version: str) -> None:
        """Delete a version. Raises TaskNotFound, VersionNotFound, and VersionInUse while an alias points at it."""

    def delete_task(self, task: str) -> None:
        """Delete a task with its versions and aliases. Should the task come back, its revisions continue.

        Raises TaskNotFound.
        """

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        """Yield every change made by any process after this call, at least once; end soon after `stop` is set.

        Several changes of a task may be reported as one. Raises StoreUnavailable when watching cannot start or
        continue: watch again then, and treat every task as changed.
        """

    def close(self) -> None:
        """Close connections and end threads. Idempotent; stored data stays."""
