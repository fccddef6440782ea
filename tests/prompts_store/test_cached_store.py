"""The cache over a store: what it remembers, in an outage too, and what it must not."""

from __future__ import annotations

import queue
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import redis

from prompts_store import (
    Alias,
    CachedStore,
    Change,
    KnownStale,
    StoreUnavailable,
    Target,
    TaskNotFound,
    open_store,
)
from prompts_store.memory_store import MemoryStore
from prompts_store.redis_store import RedisStore
from tests.prompts_store.stores import (
    SOON_S,
    bundle,
    eventually,
    two_versions,
    watching,
)

ASKED = ("get", "put", "tasks", "versions", "aliases", "set_alias", "history", "watch")


class Flaky(MemoryStore):
    """A store that counts what it is asked and can be taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.away = False

    def __getattribute__(self, name: str) -> object:
        attribute = super().__getattribute__(name)
        return partial(self.ask, attribute) if name in ASKED else attribute

    def ask(self, method: Callable[..., object], *args: object, **kwargs: object) -> object:
        self.asked[method.__name__] += 1
        if self.away:
            raise StoreUnavailable("taken away")
        return method(*args, **kwargs)


@pytest.fixture
def flaky() -> Flaky:
    return Flaky()


@pytest.fixture
def cached(flaky: Flaky) -> Iterator[CachedStore]:
    store = CachedStore(flaky)
    yield store
    store.close()


def test_the_cache_asks_once(flaky: Flaky, cached: CachedStore) -> None:
    one, _ = two_versions(cached)
    cached.set_alias("fish", "live", one)
    with watching(cached) as heard:
        MemoryStore.put(flaky, bundle(9, "cat"))
        while heard.get(timeout=SOON_S) != "cat":
            pass  # every change until here has been taken note of
    flaky.asked.clear()
    for _ in range(5):
        cached.tasks()
        cached.aliases("fish")
        cached.versions("fish")
        cached.get("fish", one)
    assert flaky.asked == {"tasks": 1, "aliases": 1, "versions": 1, "get": 1}


def test_the_cache_answers_in_an_outage(flaky: Flaky, cached: CachedStore) -> None:
    with watching(cached) as heard:
        one, two = two_versions(cached)
        cached.set_alias("fish", "live", one)
        assert (cached.get("fish", one), len(cached.versions("fish")), cached.tasks()) == (bundle(1), 2, ["fish"])
        assert list(cached.aliases("fish")) == ["live"]
        moved = cached.set_alias("fish", "live", two)
        assert [heard.get(timeout=SOON_S) for _ in range(4)] == ["fish"] * 4
    flaky.away = True
    assert cached.tasks() == ["fish"]
    assert cached.aliases("fish") == {"live": moved}, "a write that was acknowledged is not forgotten in an outage"
    assert len(cached.versions("fish")) == 2
    assert cached.get("fish", one) == bundle(1)
    for call in (
        lambda: cached.get("fish", two),
        lambda: cached.aliases("cat"),
        lambda: cached.set_alias("fish", "live", one),
        lambda: cached.refresh("fish"),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    flaky.away = False
    assert cached.set_alias("fish", "live", one, expect=2).revision == 3


def test_what_the_store_said_is_replaced_never_answers_again(flaky: Flaky, cached: CachedStore) -> None:
    """Of a change that is heard of in an outage only its task is known: 503, until the store can be read."""
    one, two = two_versions(cached)
    cached.set_alias("fish", "live", one)
    with watching(cached) as heard:
        MemoryStore.put(flaky, bundle(9, "cat"))
        while heard.get(timeout=SOON_S) != "cat":
            pass  # every change until here has been taken note of
        assert (list(cached.aliases("fish")), len(cached.versions("fish"))) == (["live"], 2)
        assert cached.get("fish", one) == bundle(1)
        flaky.away = True
        moved = MemoryStore.set_alias(flaky, "fish", "live", two)
        assert heard.get(timeout=SOON_S) == "fish"
        for call in (cached.aliases, cached.versions, lambda task: cached.get(task, one)):
            with pytest.raises(KnownStale, match="'fish' has changed in the store, which cannot be read now"):
                call("fish")
        assert (cached.known_aliases("fish"), cached.known_versions("fish")) == (None, None)
        cached._mark_all_stale()  # as the end of a watch does
        with pytest.raises(KnownStale):
            cached.aliases("fish")
        flaky.away = False
        assert cached.aliases("fish") == {"live": moved}
        flaky.away = True
        cached._mark_all_stale()
        assert cached.aliases("fish") == {"live": moved}, "an outage of which nothing is heard is survived"


def test_a_change_is_read_when_it_is_heard_of(flaky: Flaky, cached: CachedStore) -> None:
    """A rollback and a deletion by another server stay what they are in an outage right after them."""
    one, two = two_versions(cached)
    cached.set_alias("fish", "live", one)
    cached.set_alias("fish", "live", two)
    MemoryStore.put(flaky, bundle(3, "cat"))
    assert (cached.aliases("fish")["live"].heaviest, len(cached.versions("cat"))) == (two, 1)
    with watching(cached) as heard:
        MemoryStore.rollback(flaky, "fish", "live")
        MemoryStore.delete_task(flaky, "cat")
        while heard.get(timeout=SOON_S) != "cat":
            pass
    flaky.away = True
    assert cached.aliases("fish")["live"].heaviest == one
    with pytest.raises(StoreUnavailable):
        cached.versions("cat")


def test_a_change_is_told_though_the_server_is_gone_before_it_can_be_read(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    with redis_on(port, tmp_path):
        store = RedisStore(url)
        one, _ = two_versions(store)
        changes = store.watch(threading.Event())
        store.set_alias("fish", "live", one)
    assert next(changes) == Change("fish"), "the message lies in the socket; its server is dead"
    with pytest.raises(StoreUnavailable):
        next(changes)
    store.close()


def test_the_cache_recovers_from_a_server_that_was_away(tmp_path: Path) -> None:
    """A real server dies and another takes its place: what is different is seen, and nothing had to be restarted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    with redis_on(port, tmp_path):
        cached = CachedStore(open_store(url))
        one = cached.put(bundle(1))
        assert (cached.tasks(), cached.get("fish", one)) == (["fish"], bundle(1))
    assert (cached.tasks(), cached.get("fish", one)) == (["fish"], bundle(1))
    with pytest.raises(StoreUnavailable):
        cached.put(bundle(2))
    with redis_on(port, tmp_path), watching(cached) as heard:
        RedisStore(url).put(bundle(1, "cat"))
        eventually(lambda: cached.tasks() == ["cat"])
        assert heard.get(timeout=SOON_S) == "cat"
        eventually(cached._watched.is_set)
        RedisStore(url).put(bundle(1, "dog"))
        eventually(lambda: cached.tasks() == ["cat", "dog"])
    cached.close()


@contextmanager
def redis_on(port: int, folder: Path) -> Iterator[None]:
    options = ["--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(["redis-server", "--port", str(port), *options], stdout=subprocess.DEVNULL)
    with redis.Redis(port=port) as client:
        eventually(lambda: answers(client))
    try:
        yield
    finally:
        server.kill()
        server.wait(10)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False


def test_a_cache_made_while_the_store_is_away(flaky: Flaky) -> None:
    flaky.away = True
    cached = CachedStore(flaky)
    with pytest.raises(StoreUnavailable):
        cached.tasks()
    flaky.away = False
    cached.put(bundle(1))
    assert cached.tasks() == ["fish"]
    eventually(cached._watched.is_set)
    cached.close()


def test_a_change_is_told_after_it_is_taken_note_of(flaky: Flaky, cached: CachedStore) -> None:
    """Whoever reads on hearing of a change must not be answered from before it."""
    assert cached.tasks() == []
    answers_then: queue.Queue[list[str]] = queue.Queue()
    cached._broadcast.publish = lambda _: answers_then.put(cached.tasks())
    MemoryStore.put(flaky, bundle(1))
    assert answers_then.get(timeout=SOON_S) == ["fish"]


def test_without_a_watch_nothing_is_answered_from_memory() -> None:
    """The watch has broken and cannot be had again, but the store answers: then it is asked every time."""
    breaks = threading.Event()

    class Deaf(MemoryStore):
        def watch(self, stop: threading.Event) -> Iterator[Change]:
            if breaks.is_set():
                raise StoreUnavailable("no watch to be had")
            return iter(self.silence())

        def silence(self) -> Iterator[Change]:
            breaks.wait(SOON_S)
            raise StoreUnavailable("the watch broke")
            yield

    deaf = Deaf()
    cached = CachedStore(deaf)
    assert cached.tasks() == []
    deaf.put(bundle(1))
    assert cached.tasks() == [], "the watch stands and has told of nothing"
    breaks.set()
    eventually(lambda: cached.tasks() == ["fish"])
    deaf.put(bundle(1, "cat"))
    assert cached.tasks() == ["cat", "fish"]
    cached.close()


def test_unknown_names_are_not_remembered(flaky: Flaky, cached: CachedStore) -> None:
    for number in range(50):
        with pytest.raises(TaskNotFound):
            cached.aliases(f"task-{number}")
    assert cached._aliases.keys() == set()
    MemoryStore.put(flaky, bundle(1, "task-1"))
    assert cached.aliases("task-1") == {}


def test_refresh_reads_again(flaky: Flaky, cached: CachedStore) -> None:
    one, two = two_versions(cached)
    cached.aliases("fish")
    MemoryStore.set_alias(flaky, "fish", "live", two)
    cached.refresh("fish")
    assert cached.aliases("fish")["live"].targets == (Target(two),)
    MemoryStore.delete_task(flaky, "fish")
    cached.refresh("fish")
    with pytest.raises(TaskNotFound):
        cached.get("fish", one)


def test_an_answer_that_a_change_overtook_is_not_kept() -> None:
    """A read is under way, a change is heard of, then the old answer arrives: the next read must ask again."""
    overtaken, go = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def aliases(self, task: str) -> dict[str, Alias]:
            answer = super().aliases(task)
            if not overtaken.is_set():
                overtaken.set()
                go.wait(SOON_S)
            return answer

    slow = Slow()
    one, two = two_versions(slow)
    slow.set_alias("fish", "live", one)
    cached = CachedStore(slow)
    with ThreadPoolExecutor(1) as pool, watching(cached) as heard:
        old = pool.submit(cached.aliases, "fish")
        assert overtaken.wait(SOON_S)
        slow.set_alias("fish", "live", two)
        assert heard.get(timeout=SOON_S) == "fish"
        go.set()
        assert old.result()["live"].targets == (Target(one),)
    assert cached.aliases("fish")["live"].targets == (Target(two),)
    cached.close()


def test_bundles_are_bounded_by_bytes(flaky: Flaky) -> None:
    size = len(bundle(0).data)
    cached = CachedStore(flaky, max_bytes=3 * size)
    versions = [cached.put(bundle(number)) for number in range(5)]
    for version in versions:
        cached.get("fish", version)
        assert cached._bundles.bytes <= 3 * size
    cached.get("fish", versions[2])  # now the most recently used
    cached.get("fish", versions[0])  # pushes out versions[3]
    flaky.asked.clear()
    for number in (2, 4, 0):
        cached.get("fish", versions[number])
    assert flaky.asked["get"] == 0
    cached.get("fish", versions[3])
    assert flaky.asked["get"] == 1
    cached.close()
