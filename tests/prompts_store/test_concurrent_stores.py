"""Several views, several threads and several processes on what one store holds."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from prompts_store import (
    CachedStore,
    Store,
    Target,
    TaskNotFound,
    open_store,
)
from tests.prompts_store.stores import (
    SOON_S,
    Backend,
    bundle,
    child,
    eventually,
    finish,
    increment,
    two_versions,
    watching,
)


def test_another_view_sees_a_change_soon(backend: Backend) -> None:
    mine, theirs = backend.open(), backend.open()
    one, two = two_versions(mine)
    mine.set_alias("fish", "live", one)
    eventually(lambda: theirs.tasks() == ["fish"] and theirs.aliases("fish")["live"].targets == (Target(one),))
    theirs.get("fish", two)
    mine.set_alias("fish", "live", {one: 1, two: 1})
    eventually(lambda: len(theirs.aliases("fish")["live"].targets) == 2)
    mine.delete_task("fish")
    eventually(lambda: theirs.tasks() == [])
    with pytest.raises(TaskNotFound):
        theirs.get("fish", two)


def test_watch_names_what_changed(backend: Backend) -> None:
    mine, theirs = backend.open(), backend.open()
    with watching(theirs) as heard:
        for task in ("fish", "cat"):
            mine.put(bundle(1, task))
            assert heard.get(timeout=SOON_S) == task
        version = bundle(1).version
        for change in (
            lambda: mine.set_alias("fish", "live", version),
            lambda: mine.delete_alias("fish", "live"),
            lambda: mine.put(bundle(2)),
            lambda: mine.delete_version("fish", bundle(2).version),
            lambda: mine.delete_task("fish"),
        ):
            change()
            assert heard.get(timeout=SOON_S) == "fish"


def test_watch_hears_what_happens_before_it_is_iterated(store: Store) -> None:
    stop = threading.Event()
    changes = store.watch(stop)
    store.put(bundle(1))
    assert next(changes).task == "fish"
    stop.set()
    assert list(changes) == []


def test_watch_ends_promptly(store: Store) -> None:
    stop = threading.Event()
    changes = store.watch(stop)
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    began = time.monotonic()
    assert list(changes) == []
    assert time.monotonic() - began < 2
    timer.join()


def test_threads_lose_no_update(store: Store) -> None:
    one, _ = two_versions(store)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(increment, store, one, 10) for _ in range(8)]:
            done.result()
    assert store.aliases("fish")["live"].revision == 80
    assert [alias.revision for alias in store.history("fish", "live")] == list(range(1, 81))


def test_threads_put_the_same_bundles_at_once(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda number: store.put(bundle(number % 3)), range(48)))
    assert len(set(versions)) == 3
    assert {info.version for info in store.versions("fish")} == set(versions)
    for version in versions:
        store.get("fish", version)


def test_processes_lose_no_update(url: str) -> None:
    store = open_store(url)
    one, _ = two_versions(store)
    children = [child("increment(open_store(sys.argv[1]), sys.argv[2], 25)", url, one) for _ in range(4)]
    for each in children:
        finish(each)
    assert [alias.revision for alias in store.history("fish", "live")] == list(range(1, 101))
    store.close()


def test_watch_hears_another_process(url: str) -> None:
    plain = open_store(url)
    cached = CachedStore(open_store(url))
    assert cached.tasks() == []
    with watching(plain) as heard, watching(cached) as heard_by_cache:
        finish(child("open_store(sys.argv[1]).put(bundle(7, 'dog'))", url))
        assert heard.get(timeout=SOON_S) == "dog"
        assert heard_by_cache.get(timeout=SOON_S) == "dog"
        assert cached.tasks() == ["dog"], "what the cache reports as changed it must not answer from memory"
    cached.close()
    plain.close()
