"""A cache in front of any store: reads come from memory, a watching thread invalidates them, an outage is survived.

    read   fresh? ── yes ─────────────────────────► from memory
              └─ no ── inner store ── answers ────► cached; fresh while the watch runs
                             └─ unavailable ── perhaps changed? ► the stale value; a store that hangs is waited for once
                                              └─ surely changed ► KnownStale
    write  inner store, then the task's cached values are stale (but know the alias just set)
    watch  a task changed ── its values are replaced, and read again ── then this store's own watchers are notified

So an outage is survived with the values of before it, but never with one that the store has said is replaced: a
rollback or a deletion stays one.

Verified bundles are in a least-recently-used cache bounded by bytes. Names that do not exist are not cached.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from prompts_store.alias import ANY, Alias, Expect, Targets
from prompts_store.broadcast import Broadcast
from prompts_store.bundle import Bundle
from prompts_store.errors import KnownStale, StoreError, StoreUnavailable, TaskNotFound
from prompts_store.read_cache import BundleCache, CircuitBreaker, ReadCache
from prompts_store.store import Change, Store, VersionInfo

log = logging.getLogger(__name__)

CACHE_BYTES: Final = 256 * 2**20
REWATCH_S: Final = 1.0  # between attempts to watch a store that does not answer
_ALL: Final = "*"  # the one key of the list of tasks


class CachedStore:
    """The store contract over another store, which it owns: `close` closes both."""

    def __init__(self, inner: Store, *, max_bytes: int = CACHE_BYTES) -> None:
        self._inner = inner
        self._bundles = BundleCache(max_bytes)
        self._watched, self._stop = threading.Event(), threading.Event()
        self._breaker = CircuitBreaker()
        self._tasks: ReadCache[list[str]] = ReadCache(self._watched, self._breaker)
        self._versions: ReadCache[list[VersionInfo]] = ReadCache(self._watched, self._breaker)
        self._aliases: ReadCache[dict[str, Alias]] = ReadCache(self._watched, self._breaker)
        self._broadcast = Broadcast()
        changes = self._first_watch()
        self._watcher = threading.Thread(target=self._follow, args=(changes,), name="store-watch", daemon=True)
        self._watcher.start()

    # --- reading ------------------------------------------------------------------------------------------------------

    def get(self, task: str, version: str) -> Bundle:
        bundle = self._bundles.get(task, version)
        if bundle is not None and self._still_listed(task, version):
            return bundle
        bundle = self._inner.get(task, version)
        self._bundles.put(bundle)
        return bundle

    def _still_listed(self, task: str, version: str) -> bool:
        try:
            return any(info.version == version for info in self.versions(task))
        except TaskNotFound:
            return False
        except KnownStale:
            raise
        except StoreUnavailable:
            return True

    def tasks(self) -> list[str]:
        return list(self._tasks.read(_ALL, self._inner.tasks))

    def versions(self, task: str) -> list[VersionInfo]:
        return list(self._versions.read(task, lambda: self._inner.versions(task)))

    def aliases(self, task: str) -> dict[str, Alias]:
        return dict(self._aliases.read(task, lambda: self._inner.aliases(task)))

    def known_aliases(self, task: str) -> dict[str, Alias] | None:
        """Return `aliases` from memory, or None where the inner store would be read. Safe to call on an event loop."""
        cached = self._aliases.peek(task)
        return dict(cached) if cached is not None else None

    def known_versions(self, task: str) -> list[VersionInfo] | None:
        """As `known_aliases`, for `versions`."""
        cached = self._versions.peek(task)
        return list(cached) if cached is not None else None

    def history(self, task: str, alias: str) -> list[Alias]:
        return self._inner.history(task, alias)

    def refresh(self, task: str) -> None:
        """Read a task again now, or forget one that is gone. Raises StoreUnavailable and keeps the stale values."""
        try:
            aliases, versions = self._inner.aliases(task), self._inner.versions(task)
        except TaskNotFound:
            self._forget(task)
            return
        self._tasks.mark_stale(_ALL)
        self._aliases.put_stale(task, aliases)
        self._versions.put_stale(task, versions)

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, bundle: Bundle) -> str:
        with self._writing(bundle.manifest.task):
            return self._inner.put(bundle)

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        with self._writing(task):
            changed = self._inner.set_alias(task, alias, targets, expect=expect)
        return self._put_alias(task, changed)

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        with self._writing(task):
            self._inner.delete_alias(task, alias, expect=expect)
        self._aliases.amend(task, lambda aliases: {name: other for name, other in aliases.items() if name != alias})

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        with self._writing(task):
            changed = self._inner.rollback(task, alias, expect=expect)
        return self._put_alias(task, changed)

    def delete_version(self, task: str, version: str) -> None:
        with self._writing(task):
            self._inner.delete_version(task, version)
        self._bundles.drop(task, version)

    def delete_task(self, task: str) -> None:
        with self._writing(task):
            self._inner.delete_task(task)
        self._forget(task)

    @contextmanager
    def _writing(self, task: str) -> Iterator[None]:
        """Mark the task stale after the write, even if its outcome is unknown: the next read asks the inner store."""
        try:
            yield
        finally:
            self._mark_stale(task)

    def _put_alias(self, task: str, changed: Alias) -> Alias:
        """Cache the alias just written, so that an outage right after the write does not bring its old targets back."""

        def newer(aliases: dict[str, Alias]) -> dict[str, Alias]:
            old = aliases.get(changed.name)
            return aliases if old is not None and old.revision > changed.revision else aliases | {changed.name: changed}

        self._aliases.amend(task, newer)
        return changed

    def _mark_stale(self, task: str) -> None:
        self._tasks.mark_stale(_ALL)
        self._aliases.mark_stale(task)
        self._versions.mark_stale(task)

    def _forget(self, task: str) -> None:
        self._tasks.mark_stale(_ALL)
        self._aliases.drop(task)
        self._versions.drop(task)

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        """As the inner store's. A reported change is already stale in the cache: a read after it sees the change."""
        return self._broadcast.subscribe(stop)

    def close(self) -> None:
        self._stop.set()
        self._watcher.join()
        self._breaker.close()
        self._inner.close()

    def _first_watch(self) -> Iterator[Change] | None:
        """Start watching in the constructor, not in the thread, so that no change after the constructor is missed."""
        try:
            changes = self._inner.watch(self._stop)
        except StoreUnavailable as error:
            log.warning("the store cannot be watched yet: %s", error.detail)
            return None
        self._watched.set()
        return changes

    def _follow(self, changes: Iterator[Change] | None) -> None:
        failing = ""
        while not self._stop.is_set():
            try:
                for change in changes or self._watch_again():
                    self._replace(change.task)
                    self._broadcast.publish(change.task)
            except StoreUnavailable as error:
                if error.detail != failing or self._watched.is_set():  # once, however long it lasts
                    log.warning("the store cannot be watched: %s", error.detail)
                failing = error.detail
            except Exception:  # this thread must survive any error: without it no value would be fresh again
                log.exception("watching the store failed")
            changes = None
            self._watched.clear()
            self._mark_all_stale()
            self._stop.wait(REWATCH_S)

    def _replace(self, task: str) -> None:
        """Read what is cached of a changed task again, so that an outage after the change does not leave it unknown."""
        self._tasks.mark_stale(_ALL)
        self._aliases.mark_replaced(task)
        self._versions.mark_replaced(task)
        with suppress(StoreError):
            for cache, load in ((self._aliases, self.aliases), (self._versions, self.versions)):
                if task in cache:
                    load(task)

    def _watch_again(self) -> Iterator[Change]:
        """Watch after an outage: changes may have been missed, so every task may have changed."""
        changes = self._inner.watch(self._stop)
        self._watched.set()
        for task in sorted({*self._inner.tasks(), *self._aliases.keys(), *self._versions.keys()}):
            self._mark_stale(task)
            self._broadcast.publish(task)
        return changes

    def _mark_all_stale(self) -> None:
        for cache in (self._tasks, self._aliases, self._versions):
            cache.mark_all_stale()
