"""A store in the memory of the process, for tests and experiments; its contents go with the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from prompts_store.alias import ANY, Alias, AliasBook, Expect, Targets
from prompts_store.broadcast import Broadcast
from prompts_store.bundle import Bundle
from prompts_store.errors import TaskNotFound, VersionInUse, VersionNotFound
from prompts_store.store import Change, VersionInfo, newest_first


class MemoryStore:
    """The store contract over two dictionaries and a lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bundles: dict[str, dict[str, Bundle]] = {}  # task → version → bundle
        self._books: dict[str, AliasBook] = {}
        self._broadcast = Broadcast()

    def put(self, bundle: Bundle) -> str:
        task = bundle.manifest.task
        kept = Bundle.verified(bundle.data, task=task, version=bundle.version)
        with self._lock:
            versions = self._bundles.setdefault(task, {})
            if kept.version not in versions:
                versions[kept.version] = kept
                self._broadcast.publish(task)
        return kept.version

    def get(self, task: str, version: str) -> Bundle:
        with self._lock:
            try:
                return self._versions(task)[version]
            except KeyError:
                raise VersionNotFound(task, version) from None

    def tasks(self) -> list[str]:
        with self._lock:
            return sorted(self._bundles)

    def versions(self, task: str) -> list[VersionInfo]:
        with self._lock:
            bundles = list(self._versions(task).values())
        return newest_first(VersionInfo(bundle.version, len(bundle.data), bundle.manifest) for bundle in bundles)

    def aliases(self, task: str) -> dict[str, Alias]:
        with self._lock:
            return self._book(task).current()

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        with self._lock:
            versions = self._versions(task)
            changed = self._book(task).set(alias, targets, expect=expect, versions=versions.keys(), now=time.time())
            self._broadcast.publish(task)
            return changed

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        with self._lock:
            self._book(task).delete(alias, expect=expect)
            self._broadcast.publish(task)

    def history(self, task: str, alias: str) -> list[Alias]:
        with self._lock:
            return self._book(task).history(alias)

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        with self._lock:
            versions = self._versions(task)
            changed = self._book(task).rollback(alias, expect=expect, versions=versions.keys(), now=time.time())
            self._broadcast.publish(task)
            return changed

    def delete_version(self, task: str, version: str) -> None:
        with self._lock:
            versions = self._versions(task)
            if version not in versions:
                raise VersionNotFound(task, version)
            if users := self._book(task).users_of(version):
                raise VersionInUse(task, version, users)
            del versions[version]
            if not versions:
                del self._bundles[task]
            self._broadcast.publish(task)

    def delete_task(self, task: str) -> None:
        with self._lock:
            self._book(task).clear()
            del self._bundles[task]
            self._broadcast.publish(task)

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        return self._broadcast.subscribe(stop)

    def close(self) -> None:
        """There is nothing to close."""

    def _versions(self, task: str) -> dict[str, Bundle]:
        if task not in self._bundles:
            raise TaskNotFound(task)
        return self._bundles[task]

    def _book(self, task: str) -> AliasBook:
        self._versions(task)
        return self._books.setdefault(task, AliasBook(task))
