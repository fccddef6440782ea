"""A version that cannot be loaded: quarantined and told of, while the version before it goes on answering."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from prompts_store import CachedStore, CorruptBundle, StoreUnavailable, VersionNotFound, open_store
from server.errors import Conflict
from server.serving import quarantine
from server.serving.answers import Answer
from server.serving.resolver import Ref
from tests.serving.floor import Floor, bundle, png, publish

pytestmark = pytest.mark.anyio


class Damaged:
    """A store of a kind, and how its bytes are spoilt behind its back."""

    def __init__(self, kind: str, tmp_path: Path, redis_url: str) -> None:
        self.kind, self.folder, self.redis_url = kind, tmp_path, redis_url
        self.store = CachedStore(open_store(f"file://{tmp_path}" if kind == "file" else redis_url))

    def spoil(self, version: str, data: bytes | None = None) -> None:
        if self.kind == "file":
            path = self.folder / "tasks" / "fish" / "versions" / f"{version}.safetensors"
            path.write_bytes(path.read_bytes()[:-3] + b"bad" if data is None else data)
            return
        with redis.Redis.from_url(self.redis_url) as client:
            key = f"lensrack:store:task:fish:bundle:{version}"
            client.set(key, bytes(client.get(key) or b"")[:-3] + b"bad" if data is None else data)

    def spoil_aliases(self) -> None:
        if self.kind == "file":
            (self.folder / "tasks" / "fish" / "aliases.json").write_text("{damaged")
            return
        with redis.Redis.from_url(self.redis_url) as client:
            client.set("lensrack:store:task:fish:aliases", "{damaged")


@pytest.fixture(params=["file", "redis"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Damaged]:
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""
    made = Damaged(request.param, tmp_path, url)
    yield made
    made.store.close()


@asynccontextmanager
async def floor(damaged: Damaged) -> AsyncIterator[Floor]:
    built = Floor(damaged.store)
    try:
        yield built
        assert built.shelf.in_use == 0
    finally:
        await built.close()


async def ask(built: Floor, ref: str = "fish", key: str = "") -> Answer:
    return await built.predictor.predict(Ref.parse_all(ref), [png(3)], 1, key=key, tenant="", timeout_s=20)


async def test_the_version_before_a_damaged_one_answers_and_says_so(
    damaged: Damaged, caplog: pytest.LogCaptureFixture
) -> None:
    async with floor(damaged) as built:
        good, bad = publish(damaged.store, seed=1), publish(damaged.store, seed=2)
        damaged.spoil(bad)
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert (await ask(built)).version == good
        assert built.predictor.quarantine.count() == 1
        told = [record.message for record in caplog.records if record.name == "server.serving.quarantine"]
        assert len(told) == 1
        assert bad in told[0]
        assert "expected a bundle with digest" in told[0]
        for name in (bad, bad[:12]):
            with pytest.raises(CorruptBundle):
                await ask(built, f"fish@{name}")


async def test_a_damaged_version_is_not_read_for_every_request(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        publish(damaged.store, seed=1)
        damaged.spoil(publish(damaged.store, seed=2))
        asked: list[str] = []
        built.shelf.before_load = asked.append
        for _ in range(5):
            await ask(built)
        assert len(asked) == 2


async def test_a_mended_version_answers_again(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    async with floor(damaged) as built:
        good, bad = publish(damaged.store, seed=1), publish(damaged.store, seed=2)
        damaged.spoil(bad)
        assert (await ask(built)).version == good
        damaged.store.put(bundle(seed=2))
        monkeypatch.setattr(quarantine, "RETRY_S", 0.0)
        built.predictor.quarantine.put("fish", bad, CorruptBundle("still"))
        assert (await ask(built)).version == bad
        assert built.predictor.quarantine.count() == 0


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"PK\x03\x04"], ids=["emptied", "zeros", "a zip"])
async def test_whatever_lies_there(damaged: Damaged, data: bytes) -> None:
    async with floor(damaged) as built:
        good, bad = publish(damaged.store, seed=1), publish(damaged.store, seed=2)
        damaged.spoil(bad, data)
        assert (await ask(built)).version == good


async def test_with_nothing_before_it_the_reason_is_told(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        damaged.spoil(publish(damaged.store))
        for _ in range(2):
            with pytest.raises(CorruptBundle):
                await ask(built)


async def test_the_other_side_of_a_split_answers_for_a_damaged_canary(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        first, stable, canary = (damaged.store.put(bundle(seed=seed)) for seed in (1, 2, 3))
        damaged.store.set_alias("fish", "live", first)
        damaged.store.set_alias("fish", "live", {stable: 0.5, canary: 0.5})
        damaged.spoil(canary)
        assert {(await ask(built, key=str(key))).version for key in range(16)} == {stable}


async def test_a_version_before_it_that_is_gone_is_passed_over(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        oldest, old, new = (
            publish(damaged.store, seed=1),
            publish(damaged.store, seed=2),
            publish(damaged.store, seed=3),
        )
        damaged.store.delete_version("fish", old)
        damaged.spoil(new)
        assert (await ask(built)).version == oldest
        with pytest.raises(VersionNotFound):
            await ask(built, f"fish@{old}")


async def test_a_version_for_another_backbone_leaves_the_old_one_serving(damaged: Damaged) -> None:
    """Any failure to load, not only damage."""
    async with floor(damaged) as built:
        good, foreign = publish(damaged.store, seed=1), publish(damaged.store, seed=2)

        def refuse(version: str) -> None:
            if version == foreign:
                raise Conflict("the bundle is for backbone b, this server runs a", code="wrong_backbone")

        built.shelf.before_load = refuse
        assert (await ask(built)).version == good
        assert built.predictor.quarantine.count() == 1


async def test_a_store_that_goes_away_right_after_a_publication(damaged: Damaged, monkeypatch) -> None:
    """The alias is known to have moved, the bundle was not fetched any more: the version that was replaced, or rolled
    back, does not answer for it."""
    async with floor(damaged) as built:
        good = publish(damaged.store, seed=1)
        assert (await ask(built)).version == good
        new = publish(damaged.store, seed=2)
        damaged.store.aliases("fish")

        def away(*_: object, **__: object) -> None:
            raise StoreUnavailable("the store did not answer")

        inner = damaged.store._inner
        with monkeypatch.context() as patch:
            for name in ("get", "history", "aliases", "versions", "tasks"):
                patch.setattr(inner, name, away)
            with pytest.raises(StoreUnavailable):
                await ask(built)
            assert built.predictor.quarantine.count() == 0, "nothing is known against the version itself"
        assert (await ask(built)).version == new


async def test_a_version_that_was_rolled_back_does_not_stand_in_for_a_damaged_one(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        oldest, good, bad = (publish(damaged.store, seed=seed) for seed in (1, 2, 3))
        assert damaged.store.rollback("fish", "live").heaviest == good
        damaged.spoil(good)
        assert (await ask(built)).version == oldest
        with pytest.raises(CorruptBundle):
            await ask(built, f"fish@{good}")
        assert (await ask(built, f"fish@{bad}")).version == bad


async def test_a_version_that_another_server_deleted_does_not_answer_from_the_rack(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        old, _ = publish(damaged.store, seed=1), publish(damaged.store, seed=2)
        assert (await ask(built, f"fish@{old}")).version == old
        damaged.store._inner.delete_version("fish", old)

        async def asked_until_refused() -> None:  # within the moment that the news takes
            while True:
                await ask(built, f"fish@{old}")

        with pytest.raises(VersionNotFound):
            await asyncio.wait_for(asked_until_refused(), 10)


async def test_damaged_aliases_leave_the_known_ones(damaged: Damaged) -> None:
    async with floor(damaged) as built:
        good = publish(damaged.store, seed=1)
        assert (await ask(built)).version == good
        damaged.spoil_aliases()
        damaged.store._mark_all_stale()
        assert (await ask(built)).version == good


def test_what_nobody_asks_for_is_forgotten() -> None:
    clock = [1000.0]
    held = quarantine.Quarantine(lambda: clock[0])
    held.put("fish", "v", CorruptBundle("damaged"))
    with pytest.raises(CorruptBundle):
        held.check("fish", "v")
    clock[0] += quarantine.RETRY_S
    held.check("fish", "v")
    assert held.count() == 1
    clock[0] += quarantine.FORGOTTEN_S
    assert held.count() == 0
