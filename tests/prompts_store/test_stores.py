"""One contract, every store: memory, files, a real Redis server, and the cache over each of them."""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from prompts_store import (
    ANY,
    Alias,
    AliasConflict,
    AliasNotFound,
    Backbone,
    BadAlias,
    BadStoreUrl,
    Bundle,
    CachedStore,
    Change,
    CorruptAliases,
    CorruptBundle,
    Manifest,
    NoHistory,
    Preprocess,
    Store,
    StoreError,
    StoreUnavailable,
    Target,
    TaskNotFound,
    VersionInUse,
    VersionNotFound,
    open_store,
)
from prompts_store.file_store import FileStore
from prompts_store.memory_store import MemoryStore
from prompts_store.redis_store import RedisStore

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 15.0  # far more than any change needs to be heard of
MANIFEST = Manifest(
    task="fish",
    method="linear",
    backbone=Backbone("vit", "0" * 64),
    labels=("a", "b"),
    prompt_lengths=(0,),
    preprocess=Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "squash"),
    metrics={},
    recipe={},
    dataset=None,
    parent=None,
    created_at=1000.0,
    lensrack_version="0.1.0",
)


@cache
def bundle(seed: int, task: str = "fish", created_at: float = 1000.0, size: int = 4) -> Bundle:
    weight = np.random.default_rng(seed).standard_normal((2, size), dtype=np.float32)
    return Bundle.build(replace(MANIFEST, task=task, created_at=created_at), {"head.weight": weight})


class Backend:
    """One kind of store: opens views of the same stored things, and closes them at the end."""

    def __init__(self, open_inner: Callable[[], Store], cached: bool) -> None:
        self._open_inner, self._cached = open_inner, cached
        self._opened: list[Store] = []

    def open(self) -> Store:
        inner = self._open_inner()
        store = CachedStore(inner) if self._cached else inner
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


def urls(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"file://{request.getfixturevalue('tmp_path') / 'store'}"


def opener(kind: str, request: pytest.FixtureRequest) -> Callable[[], Store]:
    if kind == "memory":
        shared = MemoryStore()
        return lambda: shared
    url = urls(kind, request)
    return lambda: open_store(url)


@pytest.fixture(params=["memory", "file", "redis", "cached-memory", "cached-file", "cached-redis"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    kind = request.param.removeprefix("cached-")
    backend = Backend(opener(kind, request), cached=request.param != kind)
    yield backend
    backend.close()


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.open()


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """A store that several processes share."""
    return urls(request.param, request)


@contextmanager
def watching(store: Store) -> Iterator[queue.Queue[str]]:
    """The names of tasks that change while the block runs."""
    stop, heard = threading.Event(), queue.Queue()
    changes = store.watch(stop)
    thread = threading.Thread(target=lambda: [heard.put(change.task) for change in changes])
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join(5)
        assert not thread.is_alive(), "watch did not end with its stop event"


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not check():
        assert time.monotonic() < deadline, "it did not become so"
        threading.Event().wait(0.02)


# --- bundles ------------------------------------------------------------------------------------------------------


def test_put_then_get(store: Store) -> None:
    one = bundle(1)
    assert store.put(one) == one.version
    for _ in range(2):  # the second time from the cache, where there is one
        got = store.get("fish", one.version)
        assert (got.data, got.manifest, got.version) == (one.data, one.manifest, one.version)
        np.testing.assert_array_equal(got.tensors["head.weight"], one.tensors["head.weight"])


def test_put_is_idempotent_and_moves_no_alias(store: Store) -> None:
    store.put(bundle(1))
    store.set_alias("fish", "live", bundle(1).version)
    before = store.aliases("fish")
    for number in (1, 2, 1):
        store.put(bundle(number))
    assert store.aliases("fish") == before
    assert len(store.versions("fish")) == 2


def test_put_refuses_a_false_version(store: Store) -> None:
    with pytest.raises(CorruptBundle, match="expected a bundle with digest"):
        store.put(replace(bundle(1), version="0" * 64))
    with pytest.raises(CorruptBundle, match="expected a bundle of task cat, got fish"):
        store.put(replace(bundle(1), manifest=replace(MANIFEST, task="cat")))
    assert store.tasks() == []


def test_versions_are_newest_first_with_ties_by_version(store: Store) -> None:
    bundles = [bundle(n, created_at=at) for n, at in ((1, 5.0), (2, 9.0), (3, 5.0), (4, 7.0))]
    for each in bundles:
        store.put(each)
    expected = sorted(bundles, key=lambda b: (-b.manifest.created_at, b.version))
    listed = store.versions("fish")
    assert [info.version for info in listed] == [each.version for each in expected]
    assert [info.bytes for info in listed] == [len(each.data) for each in expected]
    assert [info.manifest for info in listed] == [each.manifest for each in expected]


def test_tasks_are_sorted_and_apart(store: Store) -> None:
    assert store.tasks() == []
    for task in ("zebra", "a.b-c_d", "9", "x" * 64):
        store.put(bundle(1, task))
    assert store.tasks() == ["9", "a.b-c_d", "x" * 64, "zebra"]
    with pytest.raises(VersionNotFound):
        store.get("zebra", bundle(1, "9").version)


def test_every_backend_gives_the_same_file(store: Store) -> None:
    store.put(bundle(1))
    data = store.get("fish", bundle(1).version).data
    assert hashlib.sha256(data).hexdigest() == bundle(1).version


# --- what is not there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", ["cat", "", "..", "../fish", "fish\n", "Fish", "fish/versions", "fish:versions", "a\0b", "\ud800", "x" * 65]
)
def test_unknown_and_impossible_tasks_are_not_found(store: Store, task: str) -> None:
    store.put(bundle(1))
    version = bundle(1).version
    calls: list[Callable[[], object]] = [
        lambda: store.get(task, version),
        lambda: store.versions(task),
        lambda: store.aliases(task),
        lambda: store.set_alias(task, "live", version),
        lambda: store.delete_alias(task, "live"),
        lambda: store.history(task, "live"),
        lambda: store.rollback(task, "live"),
        lambda: store.delete_version(task, version),
        lambda: store.delete_task(task),
    ]
    for call in calls:
        with pytest.raises(TaskNotFound) as caught:
            call()
        assert caught.value.code == "task_not_found"
    assert store.tasks() == ["fish"]


@pytest.mark.parametrize("version", ["0" * 64, "", "..", "../../x", "A" * 64, "0" * 63])
def test_unknown_and_impossible_versions_are_not_found(store: Store, version: str) -> None:
    store.put(bundle(1))
    for call in (
        lambda: store.get("fish", version),
        lambda: store.delete_version("fish", version),
        lambda: store.set_alias("fish", "live", version),
    ):
        with pytest.raises(VersionNotFound):
            call()
    assert store.aliases("fish") == {}


def test_unknown_aliases_are_not_found(store: Store) -> None:
    store.put(bundle(1))
    for call in (store.delete_alias, store.history, store.rollback):
        with pytest.raises(AliasNotFound):
            call("fish", "live")


# --- aliases ------------------------------------------------------------------------------------------------------


def two_versions(store: Store, task: str = "fish") -> tuple[str, str]:
    return store.put(bundle(1, task)), store.put(bundle(2, task))


def test_set_alias_counts_revisions_and_compares(store: Store) -> None:
    one, two = two_versions(store)
    before = time.time()
    first = store.set_alias("fish", "live", one, expect=None)
    assert (first.name, first.targets, first.revision) == ("live", (Target(one, 1.0),), 1)
    assert before - 1 <= first.changed_at <= time.time() + 1
    second = store.set_alias("fish", "live", two, expect=1)
    assert second.revision == 2
    for wrong in (None, 1, 3):
        with pytest.raises(AliasConflict) as caught:
            store.set_alias("fish", "live", one, expect=wrong)
        assert (caught.value.expected, caught.value.actual) == (wrong, 2)
        with pytest.raises(AliasConflict):
            store.delete_alias("fish", "live", expect=wrong)
        with pytest.raises(AliasConflict):
            store.rollback("fish", "live", expect=wrong)
    with pytest.raises(AliasConflict) as caught:
        store.set_alias("fish", "canary", one, expect=1)
    assert (caught.value.expected, caught.value.actual) == (1, None)
    assert store.aliases("fish") == {"live": second}
    assert store.set_alias("fish", "live", two, expect=ANY).revision == 3


def test_weights_are_shares(store: Store) -> None:
    one, two = two_versions(store)
    alias = store.set_alias("fish", "live", {one: 9, two: 1})
    assert alias.targets == (Target(one, 0.9), Target(two, 0.1))
    assert store.set_alias("fish", "live", [Target(two, 3), Target(one, 1)]).targets == (
        Target(two, 0.75),
        Target(one, 0.25),
    )
    assert store.aliases("fish")["live"].targets == (Target(two, 0.75), Target(one, 0.25))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e300, 1e-300, "1"])
def test_bad_weights_are_refused(store: Store, weight: float) -> None:
    one, two = two_versions(store)
    with pytest.raises(BadAlias, match="expected weights from"):
        store.set_alias("fish", "live", {one: 1, two: weight})
    assert store.aliases("fish") == {}


def test_bad_targets_and_names_are_refused(store: Store) -> None:
    one, _ = two_versions(store)
    for targets in ([], [Target(one, 0.5), Target(one, 0.5)], {f"{i:064x}": 1.0 for i in range(17)}):
        with pytest.raises(BadAlias, match=r"expected .* got"):
            store.set_alias("fish", "live", targets)
    for name in ("", "Live", "1live", "a/b", "live\n", "x" * 33):
        with pytest.raises(BadAlias, match="expected an alias name"):
            store.set_alias("fish", name, one)


def test_aliases_are_sorted_and_apart(store: Store) -> None:
    one, two = two_versions(store)
    store.set_alias("fish", "live", one)
    store.set_alias("fish", "canary", two)
    assert list(store.aliases("fish")) == ["canary", "live"]
    assert [alias.revision for alias in store.aliases("fish").values()] == [1, 1]


def test_history_is_oldest_first_and_bounded(store: Store) -> None:
    one, two = two_versions(store)
    for number in range(105):
        store.set_alias("fish", "live", (one, two)[number % 2])
    history = store.history("fish", "live")
    assert [alias.revision for alias in history] == list(range(6, 106))
    assert history[-1] == store.aliases("fish")["live"]


def test_rollback_and_back_again(store: Store) -> None:
    one, two = two_versions(store)
    store.set_alias("fish", "live", one)
    with pytest.raises(NoHistory):
        store.rollback("fish", "live")
    store.set_alias("fish", "live", two)
    store.set_alias("fish", "live", two)  # the same again is no place to go back to
    back = store.rollback("fish", "live", expect=3)
    assert (back.targets, back.revision) == ((Target(one),), 4)
    assert store.aliases("fish")["live"] == back
    assert store.rollback("fish", "live").targets == (Target(two),)
    assert [alias.revision for alias in store.history("fish", "live")] == [1, 2, 3, 4, 5]


def test_a_clock_that_goes_back_and_forth_turns_no_history_round(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of changes is their revisions', so that a rollback and a canary go where they would have gone."""
    one, two = two_versions(store)
    times = iter([5e9, 1.0, 3e9, 2.0, 4e9, 0.0])
    monkeypatch.setattr(time, "time", lambda: next(times, 1e9))
    store.set_alias("fish", "live", one)
    store.set_alias("fish", "live", {one: 9, two: 1})
    store.set_alias("fish", "live", two)
    assert store.rollback("fish", "live").targets == (Target(one, 0.9), Target(two, 0.1))
    assert store.rollback("fish", "live").targets == (Target(two),)
    assert [state.revision for state in store.history("fish", "live")] == [1, 2, 3, 4, 5]
    assert store.aliases("fish")["live"].choose("anybody") == two


def test_rollback_passes_over_what_is_gone(store: Store) -> None:
    one, two = two_versions(store)
    three = store.put(bundle(3))
    store.set_alias("fish", "live", one)
    store.set_alias("fish", "live", {two: 1, one: 1})
    store.set_alias("fish", "live", three)
    store.delete_version("fish", two)
    assert store.rollback("fish", "live").targets == (Target(one),)
    store.set_alias("fish", "live", three)
    store.delete_version("fish", one)
    with pytest.raises(NoHistory):
        store.rollback("fish", "live")


def test_revisions_go_on_after_deletion(store: Store) -> None:
    """Else an If-Match from before the deletion would fit what came after it."""
    one, _ = two_versions(store)
    store.set_alias("fish", "live", one)
    assert store.set_alias("fish", "live", one).revision == 2
    store.delete_alias("fish", "live", expect=2)
    assert store.aliases("fish") == {}
    assert store.set_alias("fish", "live", one, expect=None).revision == 3
    assert [alias.revision for alias in store.history("fish", "live")] == [3]
    store.delete_task("fish")
    store.put(bundle(1))
    assert store.aliases("fish") == {}
    assert store.set_alias("fish", "live", one, expect=None).revision == 4


# --- deletion -----------------------------------------------------------------------------------------------------


def test_a_version_in_use_stays(store: Store) -> None:
    one, two = two_versions(store)
    store.set_alias("fish", "live", {one: 9, two: 1})
    store.set_alias("fish", "canary", two)
    with pytest.raises(VersionInUse) as caught:
        store.delete_version("fish", two)
    assert caught.value.aliases == ("canary", "live")
    store.set_alias("fish", "live", one)
    store.delete_alias("fish", "canary")
    store.get("fish", two)
    store.delete_version("fish", two)
    with pytest.raises(VersionNotFound):
        store.get("fish", two)
    assert [info.version for info in store.versions("fish")] == [one]


def test_a_task_without_versions_is_none(store: Store) -> None:
    one = store.put(bundle(1))
    store.delete_version("fish", one)
    assert store.tasks() == []
    with pytest.raises(TaskNotFound):
        store.versions("fish")
    store.put(bundle(1))
    assert store.tasks() == ["fish"]


def test_delete_task_takes_everything(store: Store) -> None:
    one, _ = two_versions(store)
    other, _ = two_versions(store, "cat")
    store.set_alias("fish", "live", one)
    store.delete_task("fish")
    assert store.tasks() == ["cat"]
    with pytest.raises(TaskNotFound):
        store.get("fish", one)
    assert store.get("cat", other).version == other


# --- choosing -----------------------------------------------------------------------------------------------------


def test_the_heaviest_target_has_the_largest_share() -> None:
    alias = Alias("live", (Target("a" * 64, 0.2), Target("b" * 64, 0.5), Target("c" * 64, 0.3)), 1, 0.0)
    assert alias.heaviest == "b" * 64
    assert replace(alias, targets=(Target("a" * 64, 0.5), Target("b" * 64, 0.5))).heaviest == "a" * 64


def test_choose_is_stable_and_fair() -> None:
    alias = Alias("live", (Target("a" * 64, 0.9), Target("b" * 64, 0.1)), 1, 0.0)
    keys = [f"request-{number}" for number in range(20_000)]
    shares = Counter(alias.choose(key) for key in keys)
    assert abs(shares["b" * 64] / len(keys) - 0.1) < 0.01  # five standard deviations
    backwards = replace(alias, targets=alias.targets[::-1], revision=9)
    assert [alias.choose(key) for key in keys[:1000]] == [backwards.choose(key) for key in keys[:1000]]
    assert "".join(alias.choose(key)[0] for key in keys[:40]) == "aaaaabaaabbaabbababaaabaaaaaaaaaaaabaaba"


def test_a_growing_canary_keeps_those_it_has() -> None:
    def canary(weight: float) -> set[str]:
        alias = Alias("live", (Target("a" * 64, 1 - weight), Target("b" * 64, weight)), 1, 0.0)
        return {key for key in map(str, range(2000)) if alias.choose(key) == "b" * 64}

    assert canary(0.1) < canary(0.2) < canary(0.5)


# --- several views, several threads, several processes --------------------------------------------------------------


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


def increment(store: Store, version: str, times: int) -> None:
    """Move the alias on, `times` times, each by compare-and-set from the revision that was read."""
    for _ in range(times):
        while True:
            current = store.aliases("fish").get("live")
            try:
                store.set_alias("fish", "live", version, expect=current.revision if current else None)
                break
            except AliasConflict:
                continue


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


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process with this module's names at hand."""
    prelude = "import runpy, sys; globals().update(runpy.run_path('tests/prompts_store/test_stores.py'))\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output


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


# --- files ----------------------------------------------------------------------------------------------------------

CRASH = """
import signal

def crash_at(step):
    left = step
    def crashing(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)
        return wrapped
    for name in ("fsync", "replace", "unlink", "mkdir", "open"):
        setattr(os, name, crashing(getattr(os, name)))

def changes(store):
    store.put(bundle(3))
    store.set_alias("fish", "live", {bundle(1).version: 1, bundle(3).version: 1})
    store.put(bundle(1, "new"))
    store.delete_version("fish", bundle(2).version)
    store.delete_task("cat")

for step in itertools.count():
    root = Path(sys.argv[1], str(step))
    store = FileStore(root)
    for task in ("fish", "cat"):
        one, two = two_versions(store, task)
        store.set_alias(task, "live", {one: 1, two: 1} if task == "cat" else one)
    pid = os.fork()
    if pid == 0:
        crash_at(step)
        changes(store)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    consistent(root)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(step)
"""


def consistent(root: Path) -> None:
    """Everything listed can be read, aliases point at what exists, nothing half written is left."""
    store = FileStore(root)
    for task in store.tasks():
        versions = {info.version for info in store.versions(task)}
        assert {store.get(task, version).version for version in versions} == versions
        for alias in store.aliases(task).values():
            assert {target.version for target in alias.targets} <= versions
    assert not [path for path in root.rglob("*") if path.name.startswith(".")]
    files = {path.name.removesuffix(".safetensors") for path in root.rglob("*.safetensors")}
    assert all(len(name) == 64 for name in files)


def test_a_kill_at_any_step_leaves_a_consistent_store(tmp_path: Path) -> None:
    """kill -9 before the n-th call that changes the disk, for every n until the changes get through."""
    assert int(finish(child(CRASH, str(tmp_path)))) >= 20


@pytest.mark.parametrize("limit", [0, 1, 100, 900])
def test_a_kill_within_a_write_leaves_a_consistent_store(tmp_path: Path, limit: int) -> None:
    """The kernel kills the child once a file of its has `limit` bytes, so that exactly these reach the disk."""
    code = """
import resource, signal
store = FileStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
store.put(bundle(9, size=4000))
"""
    FileStore(tmp_path).put(bundle(1))
    process = child(code, str(tmp_path), str(limit))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGXFSZ
    consistent(tmp_path)
    assert [info.version for info in FileStore(tmp_path).versions("fish")] == [bundle(1).version]


def test_a_kill_in_the_middle_of_writing_leaves_a_consistent_store(tmp_path: Path) -> None:
    """Bigger bundles, and a kill whenever: within write() as well as between calls."""
    code = """
store = open_store(sys.argv[1])
print("writing", flush=True)
for number in itertools.count():
    store.set_alias("fish", "live", store.put(bundle(number, size=200_000)))
"""
    root = tmp_path / "store"
    for delay_s in (0.01, 0.05, 0.11):
        process = child(code, f"file://{root}")
        assert process.stdout.readline() == "writing\n"
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        consistent(root)


def test_a_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show this, a power cut would: the bytes, then the rename, then the folder reach the disk."""
    store = FileStore(tmp_path)
    store.put(bundle(1))
    steps: list[str] = []
    fsync, replace_file = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "bytes")
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        steps.append("rename")
        replace_file(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.put(bundle(2))
    store.set_alias("fish", "live", bundle(2).version)
    assert steps == ["bytes", "rename", "folder"] * 2
    store.delete_version("fish", bundle(1).version)
    assert steps[6:] == ["folder"]


def test_the_folder_is_readable_by_a_person(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    one, _ = two_versions(store)
    store.set_alias("fish", "live", one)
    assert (tmp_path / "tasks" / "fish" / "versions" / f"{one}.safetensors").read_bytes() == bundle(1).data
    assert one in (tmp_path / "tasks" / "fish" / "aliases.json").read_text()


def test_strangers_in_the_folder_are_ignored(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(bundle(1))
    versions = tmp_path / "tasks" / "fish" / "versions"
    for path in (tmp_path / "tasks" / ".DS_Store", versions / "notes.txt", versions / "short.safetensors"):
        path.write_text("hello")
    (tmp_path / "tasks" / "Not A Task").mkdir()
    assert store.tasks() == ["fish"]
    assert len(store.versions("fish")) == 1


def test_a_damaged_file_is_told_and_mended_by_putting_it_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    one, two = two_versions(store)
    path = tmp_path / "tasks" / "fish" / "versions" / f"{one}.safetensors"
    for damage in (b"", bundle(2).data, bundle(1).data[:-1], bundle(1).data[:-1] + b"\xff"):
        path.write_bytes(damage)
        with pytest.raises(CorruptBundle, match=f"expected a bundle with digest {one}"):
            store.get("fish", one)
        assert two in [info.version for info in store.versions("fish")]
    store.put(bundle(1))
    assert store.get("fish", one) == bundle(1)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"live": 1}', '{"live": {"revision": 1, "history": [{}]}}', "[" * 99999]
)
def test_damaged_aliases_are_told(tmp_path: Path, damage: str) -> None:
    store = FileStore(tmp_path)
    one, _ = two_versions(store)
    (tmp_path / "tasks" / "fish" / "aliases.json").write_text(damage)
    with pytest.raises(CorruptAliases, match="expected stored aliases"):
        store.aliases("fish")
    with pytest.raises(CorruptAliases):
        store.set_alias("fish", "live", one)


def test_a_failing_disk_names_no_path(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "secret-place")
    store.put(bundle(1))
    (tmp_path / "secret-place" / "tasks" / "cat").write_text("a file where a folder belongs")
    with pytest.raises(StoreUnavailable) as caught:
        store.put(bundle(1, "cat"))
    assert "secret-place" not in str(caught.value)


def test_a_full_disk_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable) as caught:
        store.put(bundle(1))
    assert caught.value.code == "disk_full"
    monkeypatch.undo()
    consistent(tmp_path)
    assert store.tasks() == []


# --- Redis ----------------------------------------------------------------------------------------------------------


def test_reconcile_hears_what_pubsub_dropped(redis_url: str) -> None:
    """A change whose message never arrives: the stamp alone tells of it."""
    store, other = RedisStore(redis_url, reconcile_s=0.3), RedisStore(redis_url)
    other._channel = "somewhere-else"
    with watching(store) as heard:
        other.put(bundle(1))
        assert heard.get(timeout=SOON_S) == "fish"
    store.close()
    other.close()


def test_prefixes_are_apart(redis_url: str) -> None:
    mine, theirs = RedisStore(redis_url, prefix="mine"), RedisStore(redis_url, prefix="theirs")
    mine.put(bundle(1))
    assert (mine.tasks(), theirs.tasks()) == (["fish"], [])
    with redis.Redis.from_url(redis_url) as client:
        assert all(key.startswith(b"mine:") for key in client.scan_iter())
    mine.delete_task("fish")
    with redis.Redis.from_url(redis_url) as client:
        assert list(client.scan_iter()) == [b"mine:stamps"], "nothing but the stamp outlives a task without aliases"
    mine.close()
    theirs.close()


def test_a_commit_sent_twice_counts_once(redis_url: str) -> None:
    """As when the connection breaks after the server has done it and before it has said so."""
    store = RedisStore(redis_url)
    one = store.put(bundle(1))
    commit = store._commit
    store._commit = lambda **kwargs: [commit(**kwargs), commit(**kwargs)][1]  # type: ignore[assignment]
    assert store.set_alias("fish", "live", one).revision == 1
    assert store.set_alias("fish", "live", one, expect=1).revision == 2
    assert len(store.history("fish", "live")) == 2
    store.close()


def test_damage_in_redis_is_told(redis_url: str) -> None:
    store = RedisStore(redis_url)
    one, two = two_versions(store)
    with redis.Redis.from_url(redis_url) as client:
        client.delete(f"lensrack:store:task:fish:bundle:{one}")
        client.set(f"lensrack:store:task:fish:bundle:{two}", bundle(1).data)
        client.hset("lensrack:store:task:fish:versions", two, "{}")
    for version in (one, two):
        with pytest.raises(CorruptBundle):
            store.get("fish", version)
    assert [info.version for info in store.versions("fish")] == [one]
    store.put(bundle(1))
    assert store.get("fish", one) == bundle(1)
    store.close()


def test_the_password_is_in_no_error(redis_server: str) -> None:
    address = redis_server.removeprefix("redis://")
    secret = "hunter" + "2"  # so that this line, quoted in a traceback, does not hold it
    for url in (
        f"redis://ghost:{secret}@{address}/0",  # refused: there is no such user
        f"redis://user:{secret}@127.0.0.1:1/0",  # nobody there
        f"redis://:{secret}/x@127.0.0.1:1/0",  # unescaped: parsing finds the port "hunter…"
        f"redis://:x@127.0.0.1:{secret}/0",
        f"redis://:{secret}@127.0.0.1:1/0?{secret}=1",
        f"redis:/:{secret}@127.0.0.1",
        f"{secret}-x://x",
    ):
        with pytest.raises(StoreError) as caught:
            open_store(url).tasks()
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__)
        assert secret not in told
    assert secret not in repr(open_store(f"redis://:{secret}@{address}/0"))


@pytest.mark.parametrize("url", ["", "file://", "s3://bucket", "nonsense", "memory:", "redis:localhost"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(BadStoreUrl, match=r"expected .* got"):
        open_store(url)


def test_a_relative_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("file://a b/c").put(bundle(1))
    assert (tmp_path / "a b" / "c" / "tasks" / "fish").is_dir()


# --- the cache ------------------------------------------------------------------------------------------------------


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
    one, two = two_versions(cached)
    cached.set_alias("fish", "live", one)
    assert (cached.get("fish", one), len(cached.versions("fish")), cached.tasks()) == (bundle(1), 2, ["fish"])
    assert list(cached.aliases("fish")) == ["live"]
    moved = cached.set_alias("fish", "live", two)
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


# --- any operations in any order ------------------------------------------------------------------------------------

TASKS = ("cat", "fish")
NUMBERS = st.integers(0, 3)
NAMES = st.sampled_from(["live", "canary"])
EXPECT = st.sampled_from([ANY, ANY, None, "current", 1, 2])


class StoreMachine(RuleBasedStateMachine):
    """Random operations on a store and on a model made of plain lists and dictionaries, which must agree."""

    make: Callable[[], Store]

    @initialize()
    def begin(self) -> None:
        self.store = type(self).make()
        self.stored: dict[str, set[str]] = {task: set() for task in TASKS}
        self.pointing: dict[tuple[str, str], list[tuple[int, tuple[str, ...]]]] = {}
        self.revisions: Counter[tuple[str, str]] = Counter()

    def teardown(self) -> None:
        self.store.close()

    def attempt(self, call: Callable[[], object], error: type[StoreError] | None) -> object:
        if error is None:
            return call()
        with pytest.raises(error):
            call()
        return None

    def revision(self, task: str, name: str, expect: object) -> object:
        states = self.pointing.get((task, name))
        return (states[-1][0] if states else None) if expect == "current" else expect

    def conflict(self, task: str, name: str, expect: object) -> bool:
        return expect is not ANY and expect != self.revision(task, name, "current")

    def point(self, task: str, name: str, versions: tuple[str, ...]) -> int:
        self.revisions[task, name] += 1
        self.pointing.setdefault((task, name), []).append((self.revisions[task, name], versions))
        return self.revisions[task, name]

    @rule(task=st.sampled_from(TASKS), number=NUMBERS)
    def put(self, task: str, number: int) -> None:
        self.stored[task].add(self.store.put(bundle(number, task)))

    @rule(task=st.sampled_from(TASKS), number=NUMBERS)
    def get(self, task: str, number: int) -> None:
        wanted = bundle(number, task)
        error = TaskNotFound if not self.stored[task] else VersionNotFound
        known = wanted.version in self.stored[task]
        assert self.attempt(lambda: self.store.get(task, wanted.version), None if known else error) in (wanted, None)

    @rule(task=st.sampled_from(TASKS), name=NAMES, numbers=st.lists(NUMBERS, min_size=1, unique=True), expect=EXPECT)
    def set_alias(self, task: str, name: str, numbers: list[int], expect: object) -> None:
        expect = self.revision(task, name, expect)
        versions = tuple(bundle(number, task).version for number in numbers)
        error: type[StoreError] | None = None
        if not self.stored[task]:
            error = TaskNotFound
        elif self.conflict(task, name, expect):
            error = AliasConflict
        elif not set(versions) <= self.stored[task]:
            error = VersionNotFound
        alias = self.attempt(lambda: self.store.set_alias(task, name, dict.fromkeys(versions, 1), expect=expect), error)
        if error is None:
            assert alias.revision == self.point(task, name, versions)

    @rule(task=st.sampled_from(TASKS), name=NAMES, expect=EXPECT)
    def delete_alias(self, task: str, name: str, expect: object) -> None:
        expect = self.revision(task, name, expect)
        error = self.alias_error(task, name, expect)
        self.attempt(lambda: self.store.delete_alias(task, name, expect=expect), error)
        if error is None:
            del self.pointing[task, name]

    def alias_error(self, task: str, name: str, expect: object) -> type[StoreError] | None:
        if not self.stored[task]:
            return TaskNotFound
        if self.conflict(task, name, expect):
            return AliasConflict
        return None if (task, name) in self.pointing else AliasNotFound

    @rule(task=st.sampled_from(TASKS), name=NAMES, expect=EXPECT)
    def rollback(self, task: str, name: str, expect: object) -> None:
        expect = self.revision(task, name, expect)
        error = self.alias_error(task, name, expect)
        *earlier, (_, current) = self.pointing.get((task, name), [(0, ())])
        there = [old for _, old in earlier if old != current and set(old) <= self.stored[task]]
        error = error or (None if there else NoHistory)
        alias = self.attempt(lambda: self.store.rollback(task, name, expect=expect), error)
        if error is None:
            assert alias.revision == self.point(task, name, there[-1])

    @rule(task=st.sampled_from(TASKS), number=NUMBERS)
    def delete_version(self, task: str, number: int) -> None:
        version = bundle(number, task).version
        error: type[StoreError] | None = None
        if not self.stored[task]:
            error = TaskNotFound
        elif version not in self.stored[task]:
            error = VersionNotFound
        elif any(of == task and version in states[-1][1] for (of, _), states in self.pointing.items()):
            error = VersionInUse
        self.attempt(lambda: self.store.delete_version(task, version), error)
        if error is None:
            self.stored[task].remove(version)

    @rule(task=st.sampled_from(TASKS))
    def delete_task(self, task: str) -> None:
        self.attempt(lambda: self.store.delete_task(task), None if self.stored[task] else TaskNotFound)
        self.stored[task] = set()
        self.pointing = {key: states for key, states in self.pointing.items() if key[0] != task}

    @invariant()
    def agree(self) -> None:
        assert self.store.tasks() == [task for task in TASKS if self.stored[task]]
        for task in self.store.tasks():
            assert {info.version for info in self.store.versions(task)} == self.stored[task]
            aliases = self.store.aliases(task)
            assert {(task, name) for name in aliases} == {key for key in self.pointing if key[0] == task}
            for name, alias in aliases.items():
                history = self.store.history(task, name)
                assert history[-1] == alias
                assert [
                    (state.revision, tuple(target.version for target in state.targets)) for state in history
                ] == self.pointing[task, name]


@pytest.mark.parametrize("kind", ["memory", "file", "redis", "cached-memory", "cached-redis"])
def test_any_operations_in_any_order(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    inner = kind.removeprefix("cached-")
    count = itertools.count()

    def fresh() -> Store:
        if inner == "memory":
            store: Store = MemoryStore()
        elif inner == "file":
            store = FileStore(tmp_path / str(next(count)))
        else:
            store = RedisStore(request.getfixturevalue("redis_url"), prefix=f"machine-{next(count)}")
        return CachedStore(store) if inner != kind else store

    class Machine(StoreMachine):
        make = staticmethod(fresh)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
