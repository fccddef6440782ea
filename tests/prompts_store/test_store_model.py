"""Any operations on a store in any order, held against a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from prompts_store import (
    ANY,
    AliasConflict,
    AliasNotFound,
    CachedStore,
    NoHistory,
    Store,
    StoreError,
    TaskNotFound,
    VersionInUse,
    VersionNotFound,
)
from prompts_store.file_store import FileStore
from prompts_store.memory_store import MemoryStore
from prompts_store.redis_store import RedisStore
from tests.prompts_store.stores import (
    bundle,
)

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


@pytest.mark.parametrize("kind", ["memory", "file", "redis", "cached-memory"])
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
