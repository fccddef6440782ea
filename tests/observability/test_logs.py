"""Log lines that name their request or job, and the gauges that need a query."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import Generator, Iterator
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import pytest

from lensrack import wire
from prompts_store import open_store
from server.app import instrumentation
from server.app.store_probe import StoreProbe
from server.jobs.sqlite_store import SqliteJobStore
from server.observability import logs, metrics
from server.training import co_batching
from server.training.caches.array_cache import ArrayCache
from server.training.caches.feature_cache import FeatureKey
from server.worker.context import in_separate_context
from tests.api.api_server import Api, serving
from tests.serving.floor import png, publish
from tests.worker.test_trainer import QUICK, House

JPEG = {"content-type": "image/jpeg"}


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"lensrack_{name}", labels) or 0.0


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def out(restored: None) -> io.StringIO:
    return io.StringIO()


def lines(out: io.StringIO, logger: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, out.getvalue().splitlines()) if line["logger"] == logger]


# --- log lines --------------------------------------------------------------------------------------------------------


def test_a_json_line_says_when_who_what_and_of_which_request(out: io.StringIO):
    logs.start("info", "json", out)
    log = logging.getLogger("server.somewhere")
    with logs.context(logs.REQUEST_ID, "r-1"):
        log.info("one\ntwo %s", "three", extra=logs.fields(status=200))
    log.debug("not this")
    log.warning("four")
    first, second = lines(out, "server.somewhere")
    assert first["message"] == "one\ntwo three"
    assert (first["level"], first["request_id"], first["status"]) == ("info", "r-1", 200)
    assert str(first["time"]).endswith("+00:00")
    assert "request_id" not in second
    assert len(out.getvalue().splitlines()) == 2, "an object a line, whatever the message holds"


def test_a_text_line_names_request_and_job_once(out: io.StringIO):
    logs.start("info", "text", out)
    log = logging.getLogger("server.somewhere")
    with logs.context(logs.REQUEST_ID, "r-1"), logs.context(logs.JOB_ID, "job_1"):
        log.info("job job_1: done")
        log.info("a line\n2000-01-01 00:00:00,000 ERROR forged: one")
    log.info("nobody's")
    first, second, third = out.getvalue().splitlines()
    assert first.endswith("server.somewhere: job job_1: done [r-1]")
    assert second.endswith("forged: one [r-1 job_1]"), "what a caller sends cannot begin a line of its own"
    assert third.endswith("nobody's")


@pytest.mark.parametrize("format_", ["text", "json"])
def test_no_line_holds_a_password_or_grows_without_bound(out: io.StringIO, format_: logs.Format):
    logs.start("info", format_, out)
    log = logging.getLogger("server.somewhere")
    log.info(
        "store redis://user:s3cr3t@redis:6379/0 and rediss://:s3@cr3t@h", extra=logs.fields(url="redis://:s3cr3t@h")
    )
    try:
        raise ValueError("x" * 100_000 + " redis://:s3cr3t@h")
    except ValueError:
        log.exception("no store at redis://:s3cr3t@h")
    assert "s3cr3t" not in out.getvalue()
    assert "cr3t@" not in out.getvalue()
    assert "redis://***@redis:6379/0" in out.getvalue()
    assert "ValueError" in out.getvalue()
    assert len(out.getvalue()) < 3 * logs.MAX_CHARACTERS


def test_every_line_of_a_request_has_its_id_also_from_the_engines_thread(tmp_path: Path, out: io.StringIO):
    with serving(tmp_path) as api:
        publish(api.floor.store)
        logs.start("info", "json", out, requests=True)
        api.floor.engine.culprit = lambda image: int(image.mean()) == 66
        first = api.http.post("/predict/fish", content=png(7), headers={**JPEG, "X-Request-Id": "good-1"})
        second = api.http.post("/predict/fish", content=png(66), headers={**JPEG, "X-Request-Id": "bad-1"})
        assert (first.status_code, second.status_code) == (200, 500)
        api.http.get("/healthz?key=s3cr3t")
        logs.start("info", "json", out)
        for image in (7, 66):
            api.http.post("/predict/fish", content=png(image), headers={**JPEG, "X-Request-Id": f"unasked-{image}"})
    failure, *_ = lines(out, "server.batching.engine_thread")
    assert failure["request_id"] == "bad-1", "not the request that happened to start the batcher"
    assert "RuntimeError" in str(failure["exception"])
    access = {line["request_id"]: line for line in lines(out, "server.access")}
    assert access["good-1"]["status"] == 200
    assert "unasked-7" not in access, "at DEBUG unless LENSRACK_LOG_REQUESTS asks for it"
    assert (access["unasked-66"]["level"], access["unasked-66"]["status"]) == ("warning", 500)
    assert access["good-1"]["route"] == "/predict/{task}"
    assert access["bad-1"]["path"] == "/predict/fish"
    assert "s3cr3t" not in out.getvalue(), "a query may hold anything"


def test_every_line_of_a_job_has_its_id(tmp_path: Path, out: io.StringIO):
    house = House(tmp_path)
    house.trainer = house.worker("w1", at_once=2)
    logs.start("info", "json", out)
    one, two = house.submit(recipe=QUICK), house.submit(recipe=QUICK)
    assert house.trainer.work_once()
    told = lines(out, "server.worker.trainer")
    assert {line["job_id"] for line in told} == {one.id, two.id}
    assert all(str(line["job_id"]) in str(line["message"]) for line in told), "two jobs in one thread stay apart"


# --- a generator's own context ----------------------------------------------------------------------------------------

WHOSE: ContextVar[str] = ContextVar("whose", default="nobody")


def test_generators_that_take_turns_do_not_see_each_others_variables():
    def work(name: str) -> Generator[str, str, str]:
        WHOSE.set(name)
        answer = yield WHOSE.get()
        try:
            yield f"{answer} {WHOSE.get()}"
        except ValueError:
            return f"caught, {WHOSE.get()}"
        return "not reached"

    a, b = in_separate_context(work("a")), in_separate_context(work("b"))
    assert [next(a), next(b)] == ["a", "b"]
    assert WHOSE.get() == "nobody"
    assert [a.send("sent"), b.send("sent")] == ["sent a", "sent b"]
    with pytest.raises(StopIteration) as end:
        a.throw(ValueError())
    assert end.value.value == "caught, a"
    b.close()


# --- what the floors count --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as api:
        publish(api.floor.store)
        yield api


def test_a_prediction_is_counted_under_its_task(api: Api):
    def now() -> list[float]:
        return [
            value("task_rows_total", task="fish", outcome="answered"),
            value("task_seconds_count", task="fish"),
            value("decode_seconds_count"),
            value("request_bytes_total", route="/predict/{task}"),
        ]

    before, body = now(), png(3)
    assert api.http.post("/predict/fish", content=body, headers=JPEG).status_code == 200
    api.http.get("/healthz")
    assert [after - was for after, was in zip(now(), before, strict=True)] == [1, 1, 1, len(body)]


def test_a_task_that_nobody_has_is_no_label(api: Api):
    assert api.http.post("/predict/never-published", content=png(3), headers=JPEG).status_code == 404
    assert "never-published" not in api.http.get("/metrics").text


def test_the_age_of_the_queue_is_that_of_its_oldest_row(api: Api):
    batcher, engine = api.floor.batcher, api.floor.engine
    assert batcher.oldest_s() == 0.0
    engine.gate.clear()
    engine.entered.clear()

    def ask() -> None:
        assert api.http.post("/predict/fish", content=png(3), headers=JPEG).status_code == 200

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert engine.entered.wait(10)
    threads[1].start()
    while not len(batcher):
        threading.Event().wait(0.01)
    first = batcher.oldest_s()
    threading.Event().wait(0.02)
    assert batcher.oldest_s() >= first + 0.02
    engine.gate.set()
    for thread in threads:
        thread.join(10)
    assert batcher.oldest_s() == 0.0


def test_a_job_is_counted_in_steps_images_epochs_and_attempts(tmp_path: Path):
    house = House(tmp_path)
    names = ("training_epochs_total", "training_steps_total", "training_images_total")

    def now() -> list[float]:
        return [value(name) for name in names] + [value("job_attempts_total", outcome="succeeded")]

    before = now()
    job = house.worked(house.submit(recipe={**QUICK, "epochs": 3, "batch_size": 4}))
    assert job.state == "succeeded"
    images = house.store.get("fruit", job.version).manifest.metrics["train_images"]
    steps = -(-images // 4)
    assert [after - was for after, was in zip(now(), before, strict=True)] == [3, 3 * steps, 3 * images, 1]
    assert value("worker_jobs") == 0


def test_an_attempt_whose_lease_ran_out_is_seen_by_its_successor_and_by_itself(tmp_path: Path):
    house = House(tmp_path)
    before = [value("job_leases_lost_total", seen_by=who) for who in ("successor", "holder")]
    job = house.submit(recipe=QUICK)
    stale = house.jobs.claim("dead", lease_s=0.001)
    threading.Event().wait(0.01)
    house.worked(job)
    after = [value("job_leases_lost_total", seen_by=who) for who in ("successor", "holder")]
    assert after[0] - before[0] == 1
    co_batching.run(house.trainer._resources.backbone, [house.trainer._attempt(stale)])  # it wakes up late
    assert value("job_leases_lost_total", seen_by="holder") - before[1] == 1
    assert value("job_attempts_total", outcome="superseded") >= 1


def test_a_cache_counts_who_asks_in_vain(tmp_path: Path):
    features = instrumentation.CountedFeatures(tmp_path, 10**6)
    assert isinstance(features._arrays, ArrayCache)
    key = FeatureKey("a" * 64, "b" * 64, "cpu", "float32", (0.5,) * 3, (0.5,) * 3)
    pixels = instrumentation.CountedPixels(None, disk_bytes=0, memory_bytes=0)

    def now(cache: str) -> list[float]:
        return [value("cache_requests_total", cache=cache, result=result) for result in ("hit", "miss")]

    before = now("features"), now("pixels")
    assert features.get(key) is None
    features.put(key, np.ones(3, np.float32))
    assert features.get(key) is not None
    assert pixels.get("c" * 64, "cut") is None
    assert [a - b for a, b in zip(now("features"), before[0], strict=True)] == [1, 1]
    assert [a - b for a, b in zip(now("pixels"), before[1], strict=True)] == [0, 1]


# --- the stores, looked at --------------------------------------------------------------------------------------------


def test_the_watch_says_which_store_answers_and_tells_the_log_once(
    tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
):
    bundles, jobs = open_store("redis://127.0.0.1:1/0"), SqliteJobStore(tmp_path / "jobs.sqlite")
    jobs.submit("fish", "d" * 64, "linear", {}, max_attempts=1)
    watch = StoreProbe(bundles, jobs, 1.0)
    caplog.set_level(logging.INFO)
    watch.look()
    watch.look()
    assert value("store_up", store="bundles") == 0
    assert value("store_up", store="jobs") == 1
    assert (value("jobs", state="queued"), value("jobs", state="running")) == (1, 0)
    assert caplog.text.count("the store of bundles does not answer") == 1
    bundles.close()
    watch._bundles = there = open_store(redis_url)
    watch.look()
    assert value("store_up", store="bundles") == 1
    assert "the store of bundles answers again" in caplog.text
    there.close()
    jobs.close()


@pytest.mark.anyio
async def test_the_watch_looks_until_it_is_stopped(tmp_path: Path):
    bundles, jobs = open_store(f"file://{tmp_path / 'store'}"), SqliteJobStore(tmp_path / "jobs.sqlite")
    watch = StoreProbe(bundles, jobs, 0.001)
    watch.start()
    for state in range(3):
        jobs.submit("fish", f"{state}" * 64, "linear", {}, max_attempts=1)
        for _ in range(2000):
            await asyncio.sleep(0.005)
            if value("jobs", state="queued") == state + 1:
                break
        assert value("jobs", state="queued") == state + 1
    await watch.stop()
    bundles.close()
    jobs.close()


def test_the_metrics_page_is_prometheus_text(api: Api):
    answer = api.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert wire.Health.model_validate(api.http.get("/healthz").json()).status == "ok"
    assert "# TYPE lensrack_queue_oldest_seconds gauge" in answer.text
