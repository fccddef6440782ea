"""A store that neither answers nor fails: what is known of it is answered, and one question at a time is left open."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from prompts_store import Alias, CachedStore, TaskNotFound, read_cache
from prompts_store.memory_store import MemoryStore
from tests.prompts_store.stores import SOON_S, watching
from tests.serving.floor import bundle, publish


class Hanging(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()
        self.asked = 0

    def aliases(self, task: str) -> dict[str, Alias]:
        self.asked += 1
        assert self.answers.wait(60)
        return super().aliases(task)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr(read_cache, "READ_TIMEOUT_S", 0.05)
    made = Hanging()
    yield made
    made.answers.set()


def test_what_is_known_answers_and_the_store_is_asked_once(hanging: Hanging) -> None:
    cached = CachedStore(hanging)
    with watching(cached) as heard:
        first = publish(cached)
        assert [heard.get(timeout=SOON_S) for _ in range(2)] == ["fish"] * 2
    assert cached.aliases("fish")["live"].choose("") == first
    cached._mark_stale("fish")
    hanging.answers.clear()
    before = hanging.asked
    for _ in range(20):
        assert cached.aliases("fish")["live"].choose("") == first
        known = cached.known_aliases("fish")
        assert known is not None, "an event loop need not leave for a thread while the store hangs"
        assert known["live"].choose("") == first
    assert hanging.asked == before + 1
    hanging.answers.set()
    cached._breaker._hanging.result(20)  # type: ignore[union-attr]
    second = hanging.put(bundle(seed=2))
    hanging.set_alias("fish", "live", second)
    cached._mark_stale("fish")
    assert cached.aliases("fish")["live"].choose("") == second
    cached.close()


def test_what_is_not_known_is_waited_for(hanging: Hanging) -> None:
    cached = CachedStore(hanging)
    publish(hanging)
    hanging.answers.clear()
    threading.Timer(0.3, hanging.answers.set).start()
    assert "live" in cached.aliases("fish")
    with pytest.raises(TaskNotFound):
        cached.aliases("nobody")
    cached.close()
