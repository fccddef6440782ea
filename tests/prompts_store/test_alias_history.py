"""Aliases are linearisable: what concurrent writers and readers saw fits one order of all changes, and real time.

Every call is recorded with when it began and ended. A change carries the revision that it made and a read the one that
it saw, so an order is given and only has to be checked (Herlihy and Wing, Linearizability, 1990).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from prompts_store import Alias, AliasConflict, Store, open_store
from tests.serving.floor import bundle

WRITERS, READERS, WRITES = 4, 2, 20  # all of it fits into the history that a store keeps


@dataclass(frozen=True)
class Call:
    kind: str
    began: float
    ended: float
    revision: int
    version: str


def recorded(kind: str, call: Callable[[], Alias]) -> Call:
    began = time.monotonic()
    state = call()
    return Call(kind, began, time.monotonic(), state.revision, state.targets[0].version)


def write(store: Store, versions: list[str], seed: int, into: list[Call]) -> None:
    """Each with an opening of its own, half of the time by compare and set."""
    chance = random.Random(seed)
    done = 0
    while done < WRITES:
        version = chance.choice(versions)
        try:
            if chance.random() < 0.5:
                into.append(recorded("write", lambda: store.set_alias("fish", "live", version)))  # noqa: B023
            else:
                seen = store.aliases("fish")["live"].revision
                made = recorded("write", lambda: store.set_alias("fish", "live", version, expect=seen))  # noqa: B023
                assert made.revision == seen + 1, "somebody moved it between what was compared and what was set"
                into.append(made)
        except AliasConflict:
            continue
        done += 1
        time.sleep(0.001)  # or, in memory, it is through before a reader has begun


def read(store: Store, stop: threading.Event, into: list[Call]) -> None:
    while not stop.is_set():
        into.append(recorded("read", lambda: store.aliases("fish")["live"]))


def check(calls: list[Call], history: list[Alias]) -> None:
    """Raises AssertionError for a history that no order explains."""
    written = {state.revision: state.targets[0].version for state in history}
    writes = [call for call in calls if call.kind == "write"]
    assert len({call.revision for call in writes}) == len(writes), "two writers made the same revision: one is lost"
    assert sorted(written) == list(range(1, len(history) + 1))
    assert {call.revision for call in writes} == set(written) - {1}, "a change that was told is not in the history"
    assert all(written[call.revision] == call.version for call in calls), "a torn read, or another's write"
    for earlier in calls:
        for later in calls:
            if earlier.ended < later.began:
                after = earlier.revision < later.revision or (
                    later.kind == "read" and earlier.revision == later.revision
                )
                assert after, f"{later} does not know of {earlier}"


@pytest.mark.parametrize("kind", ["file", "redis", "memory"])
def test_concurrent_histories_are_linearisable(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    own = "memory://"
    if kind != "memory":
        own = f"file://{tmp_path}" if kind == "file" else request.getfixturevalue("redis_url")
    first = open_store(own)
    versions = [first.put(bundle(seed=seed)) for seed in range(3)]
    first.set_alias("fish", "live", versions[0])
    stores = [first if kind == "memory" else open_store(own) for _ in range(WRITERS + READERS)]
    logs: list[list[Call]] = [[] for _ in stores]
    stop = threading.Event()
    readers = [
        threading.Thread(target=read, args=(store, stop, log))
        for store, log in zip(stores[WRITERS:], logs[WRITERS:], strict=True)
    ]
    writers = [
        threading.Thread(target=write, args=(store, versions, seed, log))
        for seed, (store, log) in enumerate(zip(stores[:WRITERS], logs[:WRITERS], strict=True))
    ]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(120)
    stop.set()
    for thread in readers:
        thread.join(20)
    history = first.history("fish", "live")
    assert len(history) == WRITERS * WRITES + 1
    reads = [call for log in logs[WRITERS:] for call in log]
    check([*(call for log in logs[:WRITERS] for call in log), *reads[:: max(1, len(reads) // 400)]], history)
    assert len({call.revision for call in reads}) > 3, "the readers saw it move"
    for store in {id(store): store for store in (first, *stores)}.values():
        store.close()


def state(revision: int, version: str) -> Alias:
    from prompts_store import Target

    return Alias("live", (Target(version),), revision, 0.0)


HISTORY = [state(1, "a"), state(2, "b"), state(3, "c")]
WHOLE = [Call("write", 1, 2, 2, "b"), Call("write", 3, 4, 3, "c")]


@pytest.mark.parametrize(
    "calls",
    [
        [*WHOLE, Call("write", 5, 6, 3, "c")],  # the same revision twice
        [*WHOLE, Call("read", 5, 6, 3, "b")],  # torn
        [*WHOLE, Call("read", 5, 6, 2, "b")],  # stale
        [*WHOLE, Call("read", 0, 0.5, 3, "c")],  # of the future
        [WHOLE[0]],  # a change that nobody made
        [Call("write", 3, 4, 2, "b"), Call("write", 1, 2, 3, "c")],  # against real time
    ],
    ids=["lost", "torn", "stale", "future", "unknown", "backwards"],
)
def test_the_checker_finds_what_is_wrong(calls: list[Call]) -> None:
    check(WHOLE, HISTORY)
    with pytest.raises(AssertionError):
        check(calls, HISTORY)
