"""Story 1 over the real memory store and the real decoder: bytes in, labels out, and every seat given back."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

from prompts_store import AliasNotFound, CachedStore, TaskNotFound, VersionNotFound, open_store
from server.batching.row import Row
from server.errors import BadRequest, DeadlineExceeded, Internal, QueueFull, ServiceError, Unavailable, Unprocessable
from server.serving.answers import Answer
from server.serving.decoding import ImageBatch
from server.serving.resolver import Ref
from tests.api.garbage import collected
from tests.rpc.far_floor import far, settled, spread
from tests.serving.floor import FINGERPRINT, Floor, bundle, png, publish

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["near", "far", "spread"], autouse=True)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine's pair in this process, the one of a front end before another, and that before several."""
    monkeypatch.setattr("tests.serving.test_predictor.WHERE", request.param)
    return str(request.param)


WHERE = "near"
PAIRS: dict[str, Callable[[Floor], AbstractAsyncContextManager[Any]]] = {
    "near": nullcontext,
    "far": far,
    "spread": spread,
}


near_only = pytest.mark.parametrize("where", ["near"], indirect=True)  # what comes before the pair, or is its own


@asynccontextmanager
async def floor(**changes: Any) -> AsyncIterator[Floor]:
    built = Floor(open_store("memory://"), **changes)
    try:
        async with PAIRS[WHERE](built):
            yield built
        built.batcher.check_integrity()
    finally:
        await built.close()
    assert built.shelf.in_use == 0, "a seat was not given back"


async def ask(built: Floor, ref: str = "fish", images: list[bytes] | None = None, **changes: Any) -> Answer:
    given = {"top_k": 5, "key": "k", "tenant": "", "timeout_s": 10.0, **changes}
    return await built.predictor.predict(Ref.parse_all(ref), images if images is not None else [png()], **given)


async def ask_many(built: Floor, refs: list[str], images: list[bytes] | None = None, **changes: Any) -> dict[str, Any]:
    given = {"top_k": 1, "key": "k", "tenant": "", "timeout_s": 10.0, **changes}
    return await built.predictor.predict_many(Ref.parse_each(refs), images or [png()], **given)


# --- one task ---------------------------------------------------------------------------------------------------------


async def test_bytes_in_labels_out():
    async with floor() as built:
        version = publish(built.store)
        answer = await ask(built, images=[png(6), png(7), png(8)])
        assert (answer.task, answer.version) == ("fish", version)
        assert [of_image[0].label for of_image in answer.predictions] == ["a", "b", "c"]
        for of_image in answer.predictions:
            assert [one.score for one in of_image] == sorted((one.score for one in of_image), reverse=True)
            assert math.isclose(sum(one.score for one in of_image), 1.0)
            assert [("a", "b", "c")[one.index] for one in of_image] == [one.label for one in of_image]
        assert answer.timings.decode_s > 0
        assert answer.timings.compute_s > 0


async def test_top_k_larger_than_the_classes_gives_all_of_them():
    async with floor() as built:
        publish(built.store)
        assert len((await ask(built, top_k=1000)).predictions[0]) == 3
        assert len((await ask(built, top_k=2)).predictions[0]) == 2


async def test_references_by_alias_digest_and_prefix():
    async with floor() as built:
        old, new = built.store.put(bundle(seed=1)), publish(built.store, seed=2)
        built.store.set_alias("fish", "stable", old)
        asked = {ref: (await ask(built, f"fish{ref}")).version for ref in ("", "@live", "@stable")}
        assert asked == {"": new, "@live": new, "@stable": old}
        assert (await ask(built, f"fish@{old}")).version == old
        assert (await ask(built, f"fish@{old[:8]}")).version == old


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("cat", TaskNotFound),
        ("fish@nobody", AliasNotFound),
        ("fish@" + "0" * 64, VersionNotFound),
        ("fish@" + "0" * 8, VersionNotFound),
        ("fish@abc", AliasNotFound),
    ],
)
@near_only
async def test_what_does_not_exist(ref: str, error: type[Exception]):
    async with floor() as built:
        publish(built.store)
        with pytest.raises(error):
            await ask(built, ref)


@pytest.mark.parametrize("ref", ["Fish", "", "fish@", ".fish", "fi sh", "a" * 65, "fish\n", "../x"])
@near_only
async def test_bad_task_names_name_the_pattern(ref: str):
    async with floor() as built:
        with pytest.raises(BadRequest, match=r"\[a-z0-9\]") as caught:
            await ask(built, ref)
        assert caught.value.code == "bad_task_name"


async def test_a_prefix_of_two_versions_is_ambiguous():
    async with floor() as built:
        publish(built.store)
        infos = built.store.versions("fish")

        class Twins:
            def __getattr__(self, name: str) -> Any:
                return getattr(built.store, name)

            def versions(self, task: str) -> list[Any]:
                return infos * 2

        built.predictor._resolver._store = Twins()
        with pytest.raises(BadRequest) as caught:
            await ask(built, f"fish@{infos[0].version[:10]}")
        assert caught.value.code == "ambiguous_version"


async def test_a_canary_follows_the_request_key():
    async with floor() as built:
        one, two = built.store.put(bundle(seed=1)), built.store.put(bundle(seed=2))
        built.store.set_alias("fish", "live", {one: 0.7, two: 0.3})
        keys = [f"user-{i}" for i in range(150)]
        first = [(await ask(built, key=key)).version for key in keys]
        again = [(await ask(built, key=key)).version for key in keys]
        assert first == again
        assert 20 <= Counter(first)[two] <= 75


async def test_a_bad_image_names_its_place_and_costs_nobody_anything():
    async with floor() as built:
        publish(built.store)
        with pytest.raises(BadRequest, match=r"^image 1: ") as caught:
            await ask(built, images=[png(), png()[:60], png()])
        assert (caught.value.code, caught.value.extra) == ("bad_image", {"image": 1})
        assert built.engine.rows == []


async def test_sizes_are_checked_before_anything_is_done():
    async with floor(max_queue=30) as built:
        publish(built.store)
        with pytest.raises(Unprocessable, match="expected 1 to 16, got 17"):
            await ask(built, images=[png()] * 17)
        with pytest.raises(Unprocessable, match="expected 1 to 16, got 0"):
            await ask(built, images=[])
        with pytest.raises(Unprocessable, match="1 to 20 tasks and versions, got 21"):
            await ask_many(built, [f"t{i}" for i in range(21)])
        with pytest.raises(Unprocessable, match="at most 30 images x tasks in one request, got 32"):
            await ask_many(built, ["a", "b"], [png()] * 16)


async def test_numbers_that_are_not_finite_are_no_answer():
    async with floor() as built:
        publish(built.store)
        built.engine.distort = lambda values: values * np.nan
        with pytest.raises(Internal) as caught:
            await ask(built)
        assert caught.value.code == "engine_failed"


# --- ensembles --------------------------------------------------------------------------------------------------------


def scores(answer: Answer, image: int = 0) -> dict[str, float]:
    return {one.label: one.score for one in answer.predictions[image]}


async def ensemble(built: Floor, labels: str = "cab") -> tuple[str, str]:
    """`live` and `candidate`, whose labels come in another order."""
    live, candidate = publish(built.store, seed=1), built.store.put(bundle(seed=2, labels=tuple(labels)))
    built.store.set_alias("fish", "candidate", candidate)
    return live, candidate


async def test_an_ensemble_is_the_mean_of_the_separate_answers_label_by_label():
    async with floor() as built:
        live, candidate = await ensemble(built)
        images = [png(6), png(7)]
        own = [await ask(built, f"fish@{name}", images) for name in ("live", "candidate")]
        built.engine.batches.clear()
        answer = await ask(built, "fish@live+candidate", images)
        assert answer.versions == (live, candidate)
        assert answer.version == f"{live}+{candidate}"
        for image in (0, 1):
            one, other = scores(own[0], image), scores(own[1], image)
            assert scores(answer, image) == pytest.approx(
                {name: (one[name] + other[name]) / 2 for name in one}, abs=1e-12
            )
            assert [answer.predictions[image][0].score] == [max(scores(answer, image).values())]
            assert all("abc"[best.index] == best.label for best in answer.predictions[image])
        assert [len(batch) for batch in built.engine.batches] == [4], "all rows in one batch"
        assert built.engine.distinct_images[-1] == 2, "decoded once"


async def test_an_ensemble_among_many_tasks_and_of_one_version_twice():
    async with floor() as built:
        await ensemble(built)
        publish(built.store, "bird", seed=3)
        found = await ask_many(built, ["fish@live+candidate", "bird", "fish@live live", "fish@live+gone"])
        assert len(found["fish@live+candidate"].versions) == 2
        assert len(found["bird"].versions) == 1
        alone = await ask(built)
        assert scores(found["fish@live+live"]) == pytest.approx(
            {alone.predictions[0][0].label: alone.predictions[0][0].score}
        )
        assert isinstance(found["fish@live+gone"], AliasNotFound)


@pytest.mark.parametrize("labels", ["abd", "ab", "abcd"])
async def test_versions_with_other_labels_are_no_ensemble(labels: str):
    async with floor() as built:
        await ensemble(built, labels)
        with pytest.raises(ServiceError) as caught:
            await ask(built, "fish@live+candidate")
        assert (caught.value.status, caught.value.code) == (409, "labels_differ")
        assert repr("d" if "d" in labels else "c") in caught.value.detail
        assert not built.engine.batches


async def test_an_ensemble_costs_its_rows():
    async with floor(max_queue=5) as built:
        await ensemble(built)
        with pytest.raises(Unprocessable):
            await ask(built, "fish@live+candidate", [png()] * 3)
        with pytest.raises(Unprocessable):
            await ask(built, "fish@" + "+".join(["live"] * 21))


# --- going wrong on the way -------------------------------------------------------------------------------------------


async def test_the_deadline_ends_the_wait_and_frees_the_seat_after_the_forward():
    async with floor() as built:
        publish(built.store)
        built.engine.gate.clear()
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await ask(built, timeout_s=0.05)
        assert built.shelf.in_use == 1, "its row is still inside the engine"
        built.engine.gate.set()
        await ask(built)
    assert built.shelf.in_use == 0


async def test_a_cancelled_request_withdraws_its_rows():
    async with floor(max_batch=1) as built:
        publish(built.store)
        built.engine.gate.clear()
        first = asyncio.create_task(ask(built, images=[png(1)]))
        await asyncio.to_thread(built.engine.entered.wait, 10)
        second = asyncio.create_task(ask(built, images=[png(2), png(3)]))
        while len(built.batcher) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        built.engine.gate.set()
        await first
        await ask(built, images=[png(4)])
        assert built.engine.rows == [("fish", 1), ("fish", 4)]


async def test_a_full_queue_is_told_before_an_image_is_decoded():
    async with floor(max_batch=1, max_queue=2) as built:
        publish(built.store)
        built.engine.gate.clear()
        waiting = [asyncio.create_task(ask(built, images=[png(1)]))]
        await asyncio.to_thread(built.engine.entered.wait, 10)
        waiting += [asyncio.create_task(ask(built, images=[png(2)])) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await ask(built, images=[b"would be refused if anybody looked"])
        built.engine.gate.set()
        await asyncio.gather(*waiting)


async def test_a_version_deleted_between_resolving_and_loading_is_resolved_again():
    async with floor() as built:
        old, new = publish(built.store, seed=1), built.store.put(bundle(seed=2))

        def swap(version: str) -> None:
            if version == old:
                built.store.set_alias("fish", "live", new)
                built.store.delete_version("fish", old)

        built.shelf.before_load = swap
        assert (await ask(built)).version == new
        with pytest.raises(VersionNotFound):
            await ask(built, f"fish@{old}")


async def test_an_image_the_engine_chokes_on_fails_alone():
    async with floor() as built:
        publish(built.store)
        built.engine.culprit = lambda image: image[0, 0, 0] == 99
        built.engine.gate.clear()
        asked = [asyncio.create_task(ask(built, images=[png(grey)])) for grey in (1, 99, 2)]
        await asyncio.to_thread(built.engine.entered.wait, 10)
        built.engine.gate.set()
        good, bad, also_good = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(good, Answer)
        assert isinstance(also_good, Answer)
        assert isinstance(bad, ServiceError)
        assert bad.code == "engine_failed"


async def test_a_remembering_store_is_asked_without_a_thread():
    inner = open_store("memory://")
    store = CachedStore(inner)
    built = Floor(store)
    publish(store)
    try:
        await ask(built)
        async with asyncio.timeout(10):
            while store.known_aliases("fish") is None:  # what was published is still being heard of
                await asyncio.sleep(0.01)
                await ask(built)
        asking: list[int] = []
        inner.aliases = lambda task: asking.append(threading.get_ident())  # type: ignore[method-assign]
        await ask(built)
        assert asking == []
    finally:
        await built.close()
        store.close()


# --- many tasks -------------------------------------------------------------------------------------------------------


async def test_many_tasks_one_image_decoded_once_in_one_forward():
    async with floor() as built:
        versions = {task: publish(built.store, task) for task in ("a", "b", "c")}
        await ask_many(built, list(versions))  # all resident now
        built.engine.batches.clear()
        built.engine.distinct_images.clear()
        answers = await ask_many(built, list(versions), [png(7), png(8)])
        assert {task: answer.version for task, answer in answers.items()} == versions
        assert built.engine.distinct_images == [2]
        assert sorted(built.engine.rows) == [(task, grey) for task in "abc" for grey in (7, 8)]


async def test_seats_are_given_back_where_the_engine_is_away_when_rows_are_ready():
    async with floor() as built:
        publish(built.store)
        built.shelf.before_load = lambda version: built.batcher.suspend("it hangs")
        with pytest.raises(Unavailable, match="it hangs"):
            await ask(built, images=[png(1), png(2)])
        await settled(lambda: built.shelf.in_use == 0)
        built.batcher.resume()


async def test_seats_are_given_back_where_one_versions_pixels_cannot_be_made(monkeypatch: pytest.MonkeyPatch):
    """Those of another version of the ensemble are ready by then."""
    async with floor() as built:
        versions = [publish(built.store, "fish", seed) for seed in (0, 1)]
        inputs, asked = ImageBatch.inputs, []

        async def late(self: ImageBatch, geometry: Any) -> Any:
            asked.append(geometry)
            if len(asked) == 2:
                raise Unprocessable("no pixels")
            return await inputs(self, geometry)

        monkeypatch.setattr(ImageBatch, "inputs", late)
        with pytest.raises(Unprocessable):
            await ask(built, f"fish@{'+'.join(versions)}")
        await settled(lambda: built.shelf.in_use == 0)


@near_only
async def test_rows_of_one_image_know_each_other(monkeypatch: pytest.MonkeyPatch):
    """Rows of an engine elsewhere know those that are there when they come."""
    known: dict[int, tuple[Row, ...]] = {}
    close = ImageBatch.close

    def look_before_it_is_over(pictures: ImageBatch) -> None:
        known.update({id(row): tuple(rows) for rows in pictures._rows for row in rows})
        close(pictures)

    monkeypatch.setattr(ImageBatch, "close", look_before_it_is_over)
    async with floor() as built:
        for task in ("a", "b", "c"):
            publish(built.store, task)
        offered: list[Row] = []
        offer = built.batcher._scheduler.offer
        built.batcher._scheduler.offer = lambda row: (offered.append(row), offer(row))[1]
        await ask_many(built, ["a", "b", "c"], [png(7), png(8)])
        assert len(offered) == 6
        for row in offered:
            assert {each.task for each in known[id(row)]} == {"a", "b", "c"}
            assert {id(each.image) for each in known[id(row)]} == {id(row.image)}


async def test_a_request_leaves_no_pixels_to_the_garbage_collector():
    async with floor() as built:
        for task in ("a", "b"):
            publish(built.store, task)
        await ask_many(built, ["a", "b"])
        with collected() as garbage:
            await ask(built, "a", [png(6), png(7)])
            await ask_many(built, ["a", "b"], [png(8)])
            await settled(lambda: built.shelf.in_use == 0)
        assert [one for one in garbage if isinstance(one, Row | np.ndarray)] == []


async def test_one_failing_task_leaves_the_others_their_answers():
    async with floor() as built:
        version = publish(built.store)
        answers = await ask_many(built, ["fish", "nobody", "fish@gone"])
        assert answers["fish"].version == version
        assert isinstance(answers["nobody"], TaskNotFound)
        assert isinstance(answers["fish@gone"], AliasNotFound)


@near_only
async def test_tasks_with_their_own_geometry_get_their_own_pixels():
    """Pictures of an engine elsewhere have its size, as all bundles that it serves have."""
    async with floor() as built:
        publish(built.store, "small")
        large = bundle("large").manifest.preprocess
        publish(built.store, "large", preprocess=type(large)(16, *list(vars(large).values())[1:]))
        sizes: dict[str, int] = {}
        run = built.engine.run

        def noting(work: Any) -> Any:
            sizes.update({seat.task: image.shape[0] for image, seat in work})
            return run(work)

        built.engine.run = noting
        answers = await ask_many(built, ["small", "large"])
        assert all(isinstance(answer, Answer) for answer in answers.values())
        assert sizes == {"small": 8, "large": 16}


async def test_a_late_task_is_late_alone():
    async with floor() as built:
        publish(built.store, "quick")
        publish(built.store, "slow")
        acquire = built.shelf.acquire

        async def slowly(task: str, version: str) -> Any:
            if task == "slow":
                await asyncio.sleep(5)
            return await acquire(task, version)

        built.shelf.acquire = slowly
        answers = await ask_many(built, ["quick", "slow"], timeout_s=0.3)
        assert isinstance(answers["quick"], Answer)
        assert isinstance(answers["slow"], DeadlineExceeded)


async def test_features():
    async with floor() as built:
        features = await built.predictor.embed([png(3), png(9)], tenant="", timeout_s=5)
        assert features.fingerprint == FINGERPRINT
        np.testing.assert_array_equal(features.vectors, [[3, 1, 2], [9, 1, 2]])


# --- under load -------------------------------------------------------------------------------------------------------


async def test_answers_never_mix_while_versions_move():
    """Labels tell the version: every answer's labels are those of the version it names, and each image has its own."""
    async with floor(max_batch=5, max_queue=512) as built:
        named = {publish(built.store, seed=i, labels=[f"v{i}-{c}" for c in "abc"]): i for i in range(3)}
        versions = list(named)

        async def client(number: int) -> None:
            for grey in range(10):
                answer = await ask(built, images=[png(grey), png(grey + 1)])
                which, slot = named[answer.version], built.shelf.seats[answer.version].slot
                for offset, of_image in enumerate(answer.predictions):
                    assert of_image[0].label == f"v{which}-{'abc'[(grey + offset + slot) % 3]}"

        async def mover() -> None:
            for turn in range(30):
                built.store.set_alias("fish", "live", versions[turn % 3])
                await asyncio.sleep(0.003)

        await asyncio.gather(mover(), *(client(number) for number in range(8)))
        assert len(set(built.shelf.loads)) >= 2
