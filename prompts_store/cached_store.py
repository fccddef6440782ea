"""Any store, remembered: answers from memory, kept true by a thread that watches, and still there in an outage.

    read   fresh? ── yes ─────────────────────────► from memory
              └─ no ── inner store ── answers ────► remembered, fresh while the watch stands
                             └─ unavailable, known? ► what was last known; one that hangs is waited for once
    write  inner store, then what is remembered of the task is stale (the alias just set is known)
    watch  a task changed ── stale ── then told to those who watch this store

Verified bundles lie in a least-recently-used cache bounded by bytes. Names that do not exist are not remembered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prompts_store.alias import ANY, Alias, Expect, Targets
from prompts_store.broadcast import Broadcast
from prompts_store.bundle import Bundle
from prompts_store.errors import StoreUnavailable, TaskNotFound
from prompts_store.remembered import Answers, Bundles, Patience
from prompts_store.store import Change, Store, VersionInfo

log = logging.getLogger(__name__)

CACHE_BYTES: Final = 256 * 2**20
REWATCH_S: Final = 1.0  # between attempts to watch a store that does not answer
_ALL: Final = "*"  # the one key of the list of tasks


class CachedStore:
    """The store contract over another store, which it owns: `close` closes both."""

    def __init__(self, inner: Store, *, max_bytes: int = CACHE_BYTES) -> None:
        self._inner = inner
        self._bundles = Bundles(max_bytes)
        self._watched, self._stop = threading.Event(), threading.Event()
        self._patience = Patience()
        self._tasks: Answers[list[str]] = Answers(self._watched, self._patience)
        self._versions: Answers[list[VersionInfo]] = Answers(self._watched, self._patience)
        self._aliases: Answers[dict[str, Alias]] = Answers(self._watched, self._patience)
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
        self._bundles.keep(bundle)
        return bundle

    def _still_listed(self, task: str, version: str) -> bool:
        try:
            return any(info.version == version for info in self.versions(task))
        except TaskNotFound:
            return False
        except StoreUnavailable:
            return True

    def tasks(self) -> list[str]:
        return list(self._tasks.read(_ALL, self._inner.tasks))

    def versions(self, task: str) -> list[VersionInfo]:
        return list(self._versions.read(task, lambda: self._inner.versions(task)))

    def aliases(self, task: str) -> dict[str, Alias]:
        return dict(self._aliases.read(task, lambda: self._inner.aliases(task)))

    def known_aliases(self, task: str) -> dict[str, Alias] | None:
        """What `aliases` would answer from memory, None where it would have to ask: an event loop may call this."""
        known = self._aliases.fresh(task)
        return dict(known) if known is not None else None

    def history(self, task: str, alias: str) -> list[Alias]:
        return self._inner.history(task, alias)

    def refresh(self, task: str) -> None:
        """Read a task again now; one that is gone is forgotten. Raises StoreUnavailable and keeps what it knew."""
        try:
            aliases, versions = self._inner.aliases(task), self._inner.versions(task)
        except TaskNotFound:
            self._forget(task)
            return
        self._tasks.stale(_ALL)
        self._aliases.learn(task, aliases)
        self._versions.learn(task, versions)

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, bundle: Bundle) -> str:
        with self._writing(bundle.manifest.task):
            return self._inner.put(bundle)

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        with self._writing(task):
            changed = self._inner.set_alias(task, alias, targets, expect=expect)
        return self._learn(task, changed)

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        with self._writing(task):
            self._inner.delete_alias(task, alias, expect=expect)
        self._aliases.amend(task, lambda known: {name: kept for name, kept in known.items() if name != alias})

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        with self._writing(task):
            changed = self._inner.rollback(task, alias, expect=expect)
        return self._learn(task, changed)

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
        """Whatever becomes of the write, even an outcome that is not known: the next read asks the inner store."""
        try:
            yield
        finally:
            self._stale(task)

    def _learn(self, task: str, changed: Alias) -> Alias:
        """So that an outage right after a write does not bring back what was there before it."""

        def newer(known: dict[str, Alias]) -> dict[str, Alias]:
            old = known.get(changed.name)
            return known if old is not None and old.revision > changed.revision else known | {changed.name: changed}

        self._aliases.amend(task, newer)
        return changed

    def _stale(self, task: str) -> None:
        self._tasks.stale(_ALL)
        self._aliases.stale(task)
        self._versions.stale(task)

    def _forget(self, task: str) -> None:
        self._tasks.stale(_ALL)
        self._aliases.drop(task)
        self._versions.drop(task)

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        """As the inner store's, and what it reports is already stale here: reading after a change reads the change."""
        return self._broadcast.subscribe(stop)

    def close(self) -> None:
        self._stop.set()
        self._watcher.join()
        self._patience.close()
        self._inner.close()

    def _first_watch(self) -> Iterator[Change] | None:
        """Started here and not in the thread, so that nothing that happens after the constructor goes unheard."""
        try:
            changes = self._inner.watch(self._stop)
        except StoreUnavailable as error:
            log.warning("the store cannot be watched yet: %s", error.detail)
            return None
        self._watched.set()
        return changes

    def _follow(self, changes: Iterator[Change] | None) -> None:
        while not self._stop.is_set():
            try:
                for change in changes or self._watch_again():
                    self._stale(change.task)
                    self._broadcast.publish(change.task)
            except StoreUnavailable as error:
                log.warning("the store cannot be watched: %s", error.detail)
            except Exception:  # whatever it is, this thread must live: without it nothing would be fresh again
                log.exception("watching the store failed")
            changes = None
            self._watched.clear()
            self._all_stale()
            self._stop.wait(REWATCH_S)

    def _watch_again(self) -> Iterator[Change]:
        """After an outage nobody knows what was missed: every task counts as changed."""
        changes = self._inner.watch(self._stop)
        self._watched.set()
        yield from map(Change, sorted({*self._inner.tasks(), *self._aliases.keys(), *self._versions.keys()}))
        yield from changes

    def _all_stale(self) -> None:
        for answers in (self._tasks, self._aliases, self._versions):
            answers.all_stale()
