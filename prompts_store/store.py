"""The store protocol: what every backend promises. One contract suite holds them all to it.

A task exists while it has at least one version. Reads are of one moment; every change is atomic and durable when the
call returns. Any name that no task, version or alias can have is simply not found.
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
    """Something of this task is not what it was: read it again."""

    task: str


def newest_first(infos: Iterable[VersionInfo]) -> list[VersionInfo]:
    return sorted(infos, key=lambda info: (-info.manifest.created_at, info.version))


class Store(Protocol):
    """Bundles by (task, version) and aliases by (task, name). Thread-safe; every call may raise StoreUnavailable."""

    def put(self, bundle: Bundle) -> str:
        """Keep a bundle and give its version. Idempotent; moves no alias. Raises CorruptBundle for a false version."""

    def get(self, task: str, version: str) -> Bundle:
        """Raises TaskNotFound, VersionNotFound, or CorruptBundle when the digest is not the version."""

    def tasks(self) -> list[str]:
        """Names of all tasks, sorted."""

    def versions(self, task: str) -> list[VersionInfo]:
        """Newest `created_at` first, ties by version. Raises TaskNotFound."""

    def aliases(self, task: str) -> dict[str, Alias]:
        """By name, sorted. Raises TaskNotFound."""

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        """Compare and set: an int must be the current revision, None means the alias must not exist.

        Weights are scaled to add up to 1. Raises TaskNotFound, VersionNotFound, BadAlias, AliasConflict.
        """

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        """Raises TaskNotFound, AliasNotFound, AliasConflict. A later `set_alias` goes on with higher revisions."""

    def history(self, task: str, alias: str) -> list[Alias]:
        """The last 100 states since the alias was made, oldest first. Raises TaskNotFound, AliasNotFound."""

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        """Point where the alias pointed before, as a new revision; a second rollback undoes the first.

        States of which a version has been deleted are passed over. Raises TaskNotFound, AliasNotFound, AliasConflict,
        and NoHistory when nothing is left.
        """

    def delete_version(self, task: str, version: str) -> None:
        """Raises TaskNotFound, VersionNotFound, and VersionInUse while an alias points at it."""

    def delete_task(self, task: str) -> None:
        """All versions and aliases. Revisions stay used: should the task come back, they go on. Raises TaskNotFound."""

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        """Changes from the moment of this call, by anybody, at least once each; ends soon after `stop` is set.

        Several changes of one task may come as one. Raises StoreUnavailable when it cannot start or go on: then watch
        again and take everything for changed.
        """

    def close(self) -> None:
        """Let go of connections and threads. Idempotent; what is stored stays."""
