"""What a cached store remembers: answers that may have gone stale, and bundles that cannot."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from prompts_store.bundle import Bundle
from prompts_store.errors import CorruptAliases, StoreUnavailable, TaskNotFound

T = TypeVar("T")
PATIENCE_S: Final = 2.0  # where there is an answer that may have gone stale
log = logging.getLogger(__name__)


class Patience:
    """For a store that hangs: it is waited for PATIENCE_S, and as long as that question is open nobody waits again."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="store-read")
        self._open: Future[Any] | None = None

    @property
    def late(self) -> bool:
        """Whether a question has been open for too long."""
        return self._open is not None and not self._open.done()

    def ask(self, load: Callable[[], T]) -> T:
        """What `load` gives. Raises what it raises, or StoreUnavailable when it takes too long."""
        if self.late:
            raise StoreUnavailable("the store has not answered yet")
        asked = self._pool.submit(load)
        try:
            return asked.result(PATIENCE_S)
        except TimeoutError:
            if asked.done():  # its own, not ours
                raise
            self._open = asked
            raise StoreUnavailable(f"the store did not answer within {PATIENCE_S:g} s") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Known(Generic[T]):
    value: T
    fresh: bool


class Answers(Generic[T]):
    """The last answer for each key. It is fresh from when it was loaded until something may have changed.

    `watched` tells whether changes are being heard of; whoever clears it must call `all_stale` afterwards.
    """

    def __init__(self, watched: threading.Event, patience: Patience) -> None:
        self._watched, self._patience = watched, patience
        self._lock = threading.Lock()
        self._known: dict[str, _Known[T]] = {}
        self._epoch = 0  # counts changes: an answer that was under way during one is not fresh

    def fresh(self, key: str) -> T | None:
        """The answer, if it is fresh, or if the store hangs."""
        with self._lock:
            known = self._known.get(key)
        return known.value if known is not None and (known.fresh or self._patience.late) else None

    def read(self, key: str, load: Callable[[], T]) -> T:
        """The fresh answer, or a loaded one; when the store is unavailable or damaged, the last one known."""
        with self._lock:
            known, epoch = self._known.get(key), self._epoch
        if known is not None and known.fresh:
            return known.value
        watched = self._watched.is_set()  # after the epoch: a watch that broke before now has moved it by then
        try:
            value = load() if known is None else self._patience.ask(load)
        except TaskNotFound:
            self.drop(key)
            raise
        except (StoreUnavailable, CorruptAliases) as error:
            if known is None:
                raise
            if isinstance(error, CorruptAliases):  # an outage has been told of by who watches the store
                log.error("answering with what was last known: %s", error.detail)
            return known.value
        self._keep(key, value, epoch, watched)
        return value

    def _keep(self, key: str, value: T, epoch: int, watched: bool) -> None:
        with self._lock:
            current = epoch == self._epoch
            if current or key not in self._known:
                self._known[key] = _Known(value, fresh=current and watched)

    def stale(self, key: str) -> None:
        self.amend(key, lambda value: value)

    def amend(self, key: str, change: Callable[[T], T]) -> None:
        """Mark stale, and until it is loaded again know better what it was."""
        with self._lock:
            self._epoch += 1
            if key in self._known:
                self._known[key] = _Known(change(self._known[key].value), fresh=False)

    def learn(self, key: str, value: T) -> None:
        """Know `value` from now on, but load again at the next read."""
        with self._lock:
            self._epoch += 1
            self._known[key] = _Known(value, fresh=False)

    def all_stale(self) -> None:
        with self._lock:
            self._epoch += 1
            self._known = {key: replace(known, fresh=False) for key, known in self._known.items()}

    def drop(self, key: str) -> None:
        with self._lock:
            self._epoch += 1
            self._known.pop(key, None)

    def keys(self) -> set[str]:
        with self._lock:
            return set(self._known)


class Bundles:
    """The least recently used bundles, up to `max_bytes` of files; their arrays are views of those."""

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

    def keep(self, bundle: Bundle) -> None:
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
