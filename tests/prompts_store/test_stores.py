"""One contract, every store: memory, files, a real Redis server, and a cache over a store."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prompts_store import (
    ANY,
    Alias,
    AliasConflict,
    AliasNotFound,
    BadAlias,
    CorruptBundle,
    NoHistory,
    Store,
    Target,
    TaskNotFound,
    VersionInUse,
    VersionNotFound,
)
from tests.prompts_store.stores import (
    MANIFEST,
    bundle,
    two_versions,
)

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
