"""The caches of a cached store: results of reads, which may become stale, and bundles, which never do."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Final, Generic, TypeVar

from prompts_store.bundle import Bundle
from prompts_store.errors import CorruptAliases, KnownStale, StoreUnavailable, TaskNotFound

T = TypeVar("T")
READ_TIMEOUT_S: Final = 2.0  # of a read that has a stale result to fall back on
log = logging.getLogger(__name__)


class CircuitBreaker:
    """Bounds the wait for a store that hangs: after one timeout, calls fail at once until that first call has ended."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="store-read")
        self._hanging: Future[Any] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a call that timed out is still running."""
        return self._hanging is not None and not self._hanging.done()

    def call(self, load: Callable[[], T]) -> T:
        """Return the result of `load`. Raises its errors, and StoreUnavailable after READ_TIMEOUT_S."""
        if self.is_open:
            raise StoreUnavailable("the store has not answered yet")
        future = self._pool.submit(load)
        try:
            return future.result(READ_TIMEOUT_S)
        except TimeoutError:
            if future.done():  # `load` itself raised it
                raise
            self._hanging = future
            raise StoreUnavailable(f"the store did not answer within {READ_TIMEOUT_S:g} s") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _State(Enum):
    FRESH = auto()  # answers without asking the store
    STALE = auto()  # may have changed: the store is asked, and while it is unavailable the value answers
    REPLACED = auto()  # has changed: the store is asked, and while it is unavailable nothing answers


@dataclass(frozen=True)
class _Entry(Generic[T]):
    value: T
    state: _State


class ReadCache(Generic[T]):
    """The last value read for each key: fresh from when it was loaded until its task changes or may have changed.

    `watched` is set while changes are being reported; after clearing it, call `mark_all_stale`.
    """

    def __init__(self, watched: threading.Event, breaker: CircuitBreaker) -> None:
        self._watched, self._breaker = watched, breaker
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry[T]] = {}
        self._epoch = 0  # counts changes: a value that was being loaded during one is not fresh

    def peek(self, key: str) -> T | None:
        """Return the cached value if `read` would return it without asking the store; None otherwise."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is None or entry.state is _State.REPLACED:
            return None
        return entry.value if entry.state is _State.FRESH or self._breaker.is_open else None

    def read(self, key: str, load: Callable[[], T]) -> T:
        """Return the fresh value, or load it; where the store is unavailable or damaged, return the stale value.

        Raises KnownStale, where the store is unavailable and the value is known to be replaced.
        """
        with self._lock:
            entry, epoch = self._entries.get(key), self._epoch
        if entry is not None and entry.state is _State.FRESH:
            return entry.value
        watched = self._watched.is_set()  # read after the epoch: a watch that broke earlier has already moved it
        try:
            value = load() if entry is None else self._breaker.call(load)
        except TaskNotFound:
            self.drop(key)
            raise
        except (StoreUnavailable, CorruptAliases) as error:
            if entry is None:
                raise
            if isinstance(error, CorruptAliases):  # the watching thread logs an outage
                log.error("answering with the last known value: %s", error.detail)
            elif entry.state is _State.REPLACED:
                raise KnownStale(
                    f"{key!r} has changed in the store, which cannot be read now: {error.detail}"
                ) from error
            return entry.value
        self._put_loaded(key, value, epoch, watched)
        return value

    def _put_loaded(self, key: str, value: T, epoch: int, watched: bool) -> None:
        with self._lock:
            current = epoch == self._epoch
            if current or key not in self._entries:
                self._entries[key] = _Entry(value, _State.FRESH if current and watched else _State.STALE)

    def mark_stale(self, key: str) -> None:
        """Mark a value that may have changed."""
        self.amend(key, lambda value: value)

    def mark_replaced(self, key: str) -> None:
        """Mark a value that has changed in the store."""
        with self._lock:
            self._epoch += 1
            if key in self._entries:
                self._entries[key] = replace(self._entries[key], state=_State.REPLACED)

    def amend(self, key: str, change: Callable[[T], T]) -> None:
        """Apply `change` to a cached value and mark it stale; one that was replaced stays so."""
        with self._lock:
            self._epoch += 1
            if key in self._entries:
                entry = self._entries[key]
                self._entries[key] = _Entry(change(entry.value), _stale(entry.state))

    def put_stale(self, key: str, value: T) -> None:
        """Cache `value` as stale: the next read loads it again, and falls back on it."""
        with self._lock:
            self._epoch += 1
            self._entries[key] = _Entry(value, _State.STALE)

    def mark_all_stale(self) -> None:
        with self._lock:
            self._epoch += 1
            self._entries = {key: _Entry(entry.value, _stale(entry.state)) for key, entry in self._entries.items()}

    def drop(self, key: str) -> None:
        with self._lock:
            self._epoch += 1
            self._entries.pop(key, None)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._entries

    def keys(self) -> set[str]:
        with self._lock:
            return set(self._entries)


def _stale(state: _State) -> _State:
    return state if state is _State.REPLACED else _State.STALE


class BundleCache:
    """A least-recently-used cache of bundles, of at most `max_bytes` of files; arrays are views of the files."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._bundles: OrderedDict[tuple[str, str], Bundle] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        return self._bytes

    def get(self, task: str, version: str) -> Bundle | None:
        with self._lock:
            bundle = self._bundles.get((task, version))
            if bundle is not None:
                self._bundles.move_to_end((task, version))
            return bundle

    def put(self, bundle: Bundle) -> None:
        key = (bundle.manifest.task, bundle.version)
        with self._lock:
            if key in self._bundles or len(bundle.data) > self._max_bytes:
                return
            self._bundles[key] = bundle
            self._bytes += len(bundle.data)
            while self._bytes > self._max_bytes:
                _, evicted = self._bundles.popitem(last=False)
                self._bytes -= len(evicted.data)

    def drop(self, task: str, version: str) -> None:
        with self._lock:
            bundle = self._bundles.pop((task, version), None)
            self._bytes -= len(bundle.data) if bundle is not None else 0
