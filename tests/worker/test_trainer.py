"""One job, from claim to stored bundle, and every way in which it can end otherwise."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from prompts_store import Bundle, open_store
from prompts_store.memory_store import MemoryStore
from server.cli.sample_pictures import draw
from server.datasets.dataset_store import DatasetStore
from server.engine import backbone as backbones
from server.engine import vit
from server.engine.images.decode import Geometry
from server.errors import DiskFull, Unavailable
from server.jobs.job import Job
from server.jobs.sqlite_store import SqliteJobStore
from server.methods.registry import Registry
from server.training.caches.pixel_cache import PixelCache
from server.training.evaluate import evaluate
from server.training.progress import Progress
from server.training.recipe import resolve
from server.training.stored_images import Decoder
from server.worker import checkpoints, trainer
from server.worker.checkpoints import Checkpoints
from server.worker.dataset_reader import DatasetReader
from server.worker.heartbeat import Heartbeat
from server.worker.resources import Resources
from server.worker.trainer import Trainer

pytestmark = pytest.mark.slow

QUICK = {"epochs": 2, "batch_size": 16, "prompts": 2}


class House:
    """A trainer on real stores in a folder, with the untrained backbone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pictures.zip").write_bytes(drawn())
        self.store, self.jobs = MemoryStore(), SqliteJobStore(folder / "jobs.sqlite")
        self.datasets = DatasetStore(
            folder / "datasets", max_images=1000, max_unpacked_bytes=10**8, max_image_pixels=10**7
        )
        self.dataset = self.datasets.ingest(folder / "pictures.zip").id
        self.pool = ThreadPoolExecutor(2)
        self.trainer = self.worker("w1")

    def worker(self, name: str, at_once: int = 1) -> Trainer:
        backbone = untrained()
        decoder = self.decoder(backbone.spec.geometry)
        return Trainer(
            Resources(
                backbone,
                Registry(),
                self.datasets,
                DatasetReader(decoder),
                None,
                Checkpoints(self.folder / "checkpoints"),
            ),
            self.store,
            self.jobs,
            worker=name,
            lease_s=30,
            keep_s=0,
            at_once=at_once,
        )

    def decoder(self, geometry: Geometry) -> Decoder:
        pixels = PixelCache(None, disk_bytes=0, memory_bytes=10**7)
        return Decoder(self.read, geometry, 10**7, pixels, self.pool)

    def read(self, sha256: str) -> bytes:
        return self.datasets.read(sha256)

    def submit(self, method: str = "vpt_deep", **changes: object) -> Job:
        asked = {"dataset": self.dataset, "recipe": QUICK, **changes}
        return self.jobs.submit("fruit", asked["dataset"], method, asked["recipe"], max_attempts=3)

    def worked(self, job: Job) -> Job:
        assert self.trainer.work_once()
        return self.jobs.get(job.id)

    def events(self, job: Job) -> list[str]:
        return [event.type for event in self.jobs.events(job.id)]


@cache
def drawn() -> bytes:
    """An archive of the fruit that the samples are trained on, six pictures a class."""
    packed = io.BytesIO()
    with TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w") as archive:
        draw(Path(folder), per_class=6)
        root = Path(folder) / "fruit" / "train"
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root))
    return packed.getvalue()


@cache
def untrained() -> backbones.Backbone:
    """One for all tests, as a worker has one for all jobs."""
    return backbones.load("untrained")


@pytest.fixture(scope="module", autouse=True)
def no_job_changes_the_backbone() -> Iterator[None]:
    before = backbones.fingerprint("untrained", untrained().model.state_dict())
    yield
    assert backbones.fingerprint("untrained", untrained().model.state_dict()) == before


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "linear"])
def test_a_job_becomes_the_live_version(house: House, method: str) -> None:
    job = house.worked(house.submit(method))
    assert job.state == "succeeded"
    assert house.store.aliases("fruit")["live"].targets[0].version == job.version
    manifest = house.store.get("fruit", job.version).manifest
    assert manifest.method == method
    assert manifest.labels == ("lemon", "lime", "plum")
    assert manifest.dataset == house.dataset
    assert manifest.recipe["epochs"] == 2
    assert manifest.metrics["val_accuracy"] == job.metrics["val_accuracy"]
    assert house.events(job) == ["queued", "started", "epoch", "epoch", "published", "succeeded"]
    assert job.progress["epoch"] <= 2


def test_there_is_nothing_to_do(house: House) -> None:
    assert not house.trainer.work_once()


def test_the_same_job_twice_is_the_same_version(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that died after publishing is repeated: the same bytes, the same version."""
    job = house.submit()
    with monkeypatch.context() as patch:
        patch.setattr(house.jobs, "finish", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power cut")))
        house.trainer.work_once()
    (first,) = house.store.versions("fruit")
    again = house.worked(job)
    assert (again.state, again.attempt) == ("succeeded", 2)
    assert [info.version for info in house.store.versions("fruit")] == [first.version] == [again.version]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dataset": "f" * 64}, "dataset_not_found"),
        ({"method": "vpt_deeper"}, "unknown_method"),
        ({"recipe": {**QUICK, "optimizer": "sgd", "lr": 1e30}}, "diverged"),
        ({"recipe": {"lr": 1.0, "base_lr": 1.0}}, "invalid_request"),
    ],
)
def test_what_trying_again_cannot_mend_fails_at_once(house: House, changes: dict[str, object], code: str) -> None:
    job = house.worked(house.submit(**changes))
    assert (job.state, job.attempt) == ("failed", 1)
    assert job.error["code"] == code
    assert house.store.tasks() == []


def test_the_unexpected_is_tried_again_and_then_given_up_without_leaking(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("secret /path")

    monkeypatch.setattr(house.datasets, "read", explode)
    job = house.submit()
    states = [house.worked(job).state for _ in range(3)]
    assert states == ["queued", "queued", "failed"]
    assert "secret" not in str(house.jobs.get(job.id).error)


def test_a_disk_that_is_full_for_a_moment_costs_an_attempt_not_the_job(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("no space left")

    job = house.submit("linear")
    with monkeypatch.context() as patch:
        patch.setattr(house.datasets, "read", full)
        assert house.worked(job).state == "queued"
    assert house.worked(job).state == "succeeded"


def test_a_job_store_that_is_away_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "STORE_RETRY_S", 0.01)
    claim, calls = house.jobs.claim, []

    def away(*arguments: object) -> Job | None:
        calls.append(arguments)
        if len(calls) < 4:
            raise Unavailable("the job store does not answer", code="store_unavailable")
        return claim(*arguments)

    monkeypatch.setattr(house.jobs, "claim", away)
    job = house.submit("linear")
    worker = threading.Thread(target=house.trainer.run)
    worker.start()
    deadline = time.monotonic() + 60
    while house.jobs.get(job.id).state != "succeeded" and time.monotonic() < deadline:
        time.sleep(0.05)
    house.trainer.stop.set()
    worker.join(30)
    assert house.jobs.get(job.id).state == "succeeded"
    assert len(calls) >= 4


def during_the_first_step(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> list[Progress]:
    """Let something happen once the fit has made a step, and give the heartbeat time to notice. The steps so far."""
    on_progress, steps = Heartbeat.on_progress, []

    def watching(heartbeat: Heartbeat, progress: Progress) -> None:
        steps.append(progress)
        if len(steps) == 1:
            happen()
            time.sleep(1.2)
        on_progress(heartbeat, progress)

    monkeypatch.setattr(Heartbeat, "on_progress", watching)
    return steps


def test_a_cancelled_job_ends_at_its_next_step(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job = house.submit()
    steps = during_the_first_step(monkeypatch, lambda: house.jobs.cancel(job.id))
    assert house.worked(job).state == "cancelled"
    assert len(steps) == 1
    assert house.store.tasks() == []


def test_shutting_down_gives_the_job_back(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job = house.submit()
    during_the_first_step(monkeypatch, house.trainer.stop.set)
    assert house.worked(job).state == "queued"
    monkeypatch.undo()
    house.trainer = house.worker("w2")
    assert house.worked(job).state == "succeeded"


def test_an_interrupted_job_goes_on_where_it_was_and_ends_with_the_same_version(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job undisturbed and interrupted: created at the same moment, it must be the same bytes."""
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    monkeypatch.setattr(checkpoints, "REST", 0)
    recipe = {**QUICK, "epochs": 4}
    undisturbed = house.worked(house.submit(recipe=recipe))
    job = house.submit(recipe=recipe)
    with monkeypatch.context() as patch:
        on_progress = Heartbeat.on_progress

        def failing(heartbeat: Heartbeat, progress: Progress) -> None:
            if progress.epoch == 3:
                raise RuntimeError("power cut")
            on_progress(heartbeat, progress)

        patch.setattr(Heartbeat, "on_progress", failing)
        assert house.worked(job).state == "queued"
    assert list((house.folder / "checkpoints").iterdir())
    done = house.worked(job)
    assert (done.state, done.attempt) == ("succeeded", 2)
    epochs = [event.data["epoch"] for event in house.jobs.events(job.id) if event.type == "epoch"]
    assert epochs == [1, 2, 3, 4], "no epoch is done twice"
    first, second = (house.store.get("fruit", one.version).tensors for one in (undisturbed, done))
    assert all((first[name] == second[name]).all() for name in first)
    assert not list((house.folder / "checkpoints").iterdir()), "nothing is left behind"


def test_a_superseded_worker_publishes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease ended while it slept; another attempt has begun: what the sleeper made is dropped."""
    job = house.submit()

    def overtaken() -> None:
        house.jobs.release(job.id, 1)
        house.jobs.claim("another", 60)

    during_the_first_step(monkeypatch, overtaken)
    current = house.worked(job)
    assert (current.state, current.worker) == ("running", "another")
    assert house.store.tasks() == []


def test_a_file_store_hears_of_it_through_the_store_alone(house: House, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    house.store = open_store(url)
    house.trainer = house.worker("w3")
    job = house.worked(house.submit("linear"))
    other = open_store(url)
    assert other.aliases("fruit")["live"].targets[0].version == job.version


def test_a_search_chooses_method_and_recipe_and_tells_what_it_tried(house: House) -> None:
    job = house.worked(house.submit("auto", recipe={"search": "auto", "budget": 300, "epochs": 2, "prompts": 2}))
    assert job.state == "succeeded"
    manifest = house.store.get("fruit", job.version).manifest
    trials = manifest.metrics["search"]["trials"]
    assert {trial["method"] for trial in trials} == {"linear", "vpt_deep", "vpt_shallow"}
    assert manifest.method in {trial["method"] for trial in trials}
    assert "search" not in manifest.recipe, "the recipe is the one that was found: fitted again, it gives the same"
    assert resolve({}, manifest.recipe).to_json() == manifest.recipe
    told = [event.data for event in house.jobs.events(job.id) if event.type == "trial"]
    assert [one["trial"] for one in told] == list(range(1, len(trials) + 1))
    assert [one["lr"] for one in told] == [trial["lr"] for trial in trials]


def test_a_search_within_one_method(house: House) -> None:
    job = house.worked(house.submit("linear", recipe={"search": "auto", "epochs": 3}))
    manifest = house.store.get("fruit", job.version).manifest
    assert manifest.method == "linear"
    assert {trial["epochs"] for trial in manifest.metrics["search"]["trials"]} == {3}


def test_quick_answers_with_a_head_first_and_with_the_full_fit_later(house: House) -> None:
    job = house.worked(house.submit("auto", recipe={**QUICK, "search": "quick"}))
    assert house.events(job) == ["queued", "started", "published", "epoch", "epoch", "published", "succeeded"]
    early, late = (event.data for event in house.jobs.events(job.id) if event.type == "published")
    assert early["preliminary"] is True
    assert "preliminary" not in late
    first, second = (house.store.get("fruit", one["version"]).manifest for one in (early, late))
    assert (first.method, second.method) == ("linear", "vpt_deep")
    assert first.metrics["preliminary"] is True
    assert house.store.aliases("fruit")["live"].targets[0].version == late["version"] == job.version


def test_quick_with_a_policy_that_keeps_it_from_going_live(house: House) -> None:
    asked = {"recipe": {**QUICK, "search": "quick"}}
    job = house.jobs.submit("fruit", house.dataset, "auto", asked["recipe"], max_attempts=3, publish="never")
    assert house.worked(job).state == "succeeded"
    assert house.store.aliases("fruit") == {}
    assert len(house.store.versions("fruit")) == 2


def test_jobs_in_one_batch_are_each_what_they_are_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [{**QUICK, "seed": seed, "epochs": 2 + seed} for seed in range(3)]
    alone = [house.worked(house.submit(recipe=recipe)) for recipe in recipes]
    group = house.worker("w4", at_once=3)
    jobs = [house.submit(recipe=recipe) for recipe in recipes]
    sizes: list[int] = []
    forward = vit.forward_lanes

    def counted(backbone: backbones.Backbone, lanes: Any) -> Any:
        sizes.append(len(lanes))
        return forward(backbone, lanes)

    monkeypatch.setattr(vit, "forward_lanes", counted)
    assert group.work_once()
    assert set(sizes) == {1, 2, 3}, "they shared the forward until the shorter ones had ended"
    for before, job in zip(alone, jobs, strict=True):
        now = house.jobs.get(job.id)
        assert now.state == "succeeded"
        assert now.metrics["train_loss"] == pytest.approx(before.metrics["train_loss"], abs=1e-4)
        first, second = (house.store.get("fruit", one.version).tensors for one in (before, now))
        for name, value in first.items():
            np.testing.assert_allclose(value, second[name], atol=1e-4)
    assert not list((house.folder / "checkpoints").glob("*"))


def test_one_bad_job_in_a_batch_fails_alone(house: House) -> None:
    group = house.worker("w5", at_once=4)
    well = house.submit()
    gone = house.submit(dataset="f" * 64)
    wild = house.submit(recipe={**QUICK, "optimizer": "sgd", "lr": 1e30})
    assert group.work_once()
    states = [house.jobs.get(job.id) for job in (well, gone, wild)]
    assert [job.state for job in states] == ["succeeded", "failed", "failed"]
    assert [job.error["code"] for job in states[1:]] == ["dataset_not_found", "diverged"]


def test_a_worker_takes_no_more_jobs_than_it_may(house: House) -> None:
    jobs = [house.submit("linear", recipe={"epochs": 2}) for _ in range(3)]
    assert house.worker("w6", at_once=1).work_once()
    assert [house.jobs.get(job.id).state for job in jobs] == ["succeeded", "queued", "queued"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"augment": "crop"}, "augment"),
        ({"augment": "flip", "class_weights": "balanced", "label_smoothing": 0.1}, "label_smoothing"),
        ({"patience": 1, "epochs": 5}, "patience"),
    ],
)
def test_what_a_recipe_may_ask_for_is_done_and_told(house: House, changes: dict[str, object], told: str) -> None:
    job = house.worked(house.submit(recipe={**QUICK, **changes}))
    assert job.state == "succeeded", job.error
    manifest = house.store.get("fruit", job.version).manifest
    assert manifest.recipe[told] == changes[told]
    assert len(manifest.metrics["val"]["confusion"]) == 3
    assert 0.25 <= manifest.metrics["temperature"] <= 4


def test_an_unknown_search_fails_at_once(house: House) -> None:
    job = house.worked(house.submit(recipe={"search": "thorough"}))
    assert (job.state, job.error["code"]) == ("failed", "invalid_request")


def condensed(house: House, version: str, **how: object) -> Job:
    """A job as the API queues it: the version's own method and recipe."""
    recipe = {**QUICK, "condense": {"version": version, "keep": [0.25], "epsilon": 1.0, **how}}
    return house.worked(house.submit(recipe=recipe))


def test_a_recipe_may_end_with_a_condensation(house: House) -> None:
    step = {"keep": [0.25], "epsilon": 1.0, "epochs": 1}
    job = house.worked(house.submit(recipe={**QUICK, "condense": step}))
    assert job.state == "succeeded", job.error
    manifest = house.store.get("fruit", job.version).manifest
    assert sum(manifest.prompt_lengths) == 3 == manifest.metrics["condense"]["kept"]
    assert (manifest.parent, manifest.recipe["condense"]["keep"]) == (None, [0.25])
    assert manifest.metrics["condense"]["prompts"] == 12
    assert house.events(job) == ["queued", "started", "epoch", "epoch", "trial", "published", "succeeded"]
    again = house.worked(house.submit(recipe=manifest.recipe))
    assert house.store.get("fruit", again.version).manifest.prompt_lengths == manifest.prompt_lengths


def test_what_a_search_finds_is_condensed_too(house: House) -> None:
    step = {"keep": [0.5], "epsilon": 1.0, "epochs": 1}
    recipe = {"search": "auto", "budget": 150, "epochs": 2, "prompts": 2, "lr": 0.01, "condense": step}
    manifest = house.store.get("fruit", house.worked(house.submit(recipe=recipe)).version).manifest
    assert manifest.metrics["search"]["trials"]
    assert sum(manifest.prompt_lengths) == 6 == manifest.metrics["condense"]["kept"]


def test_a_version_is_condensed_to_a_new_one(house: House) -> None:
    parent = house.worked(house.submit())
    job = condensed(house, parent.version)
    assert job.state == "succeeded", job.error
    manifest = house.store.get("fruit", job.version).manifest
    assert manifest.parent == manifest.metrics["condense"]["version"] == parent.version
    assert sum(manifest.prompt_lengths) == 3
    assert manifest.metrics["condense"]["val_accuracy"] == parent.metrics["val_accuracy"], "the same held-out pictures"
    assert house.store.aliases("fruit")["live"].targets[0].version == job.version
    assert house.events(job) == ["queued", "started", "trial", "published", "succeeded"]


def test_a_version_that_cannot_be_made_smaller_stays(house: House) -> None:
    parent = house.worked(house.submit())
    job = condensed(house, parent.version, epsilon=-1.0)  # never good enough
    assert (job.state, job.version) == ("succeeded", parent.version)
    assert (job.metrics["published"], job.metrics["condense"]["kept"]) == (False, None)
    assert house.events(job) == ["queued", "started", "trial", "kept", "succeeded"]
    assert len(house.store.versions("fruit")) == 1


def test_a_version_whose_labels_lie_in_another_order_and_that_sees_otherwise(house: House) -> None:
    """As an imported one may: the head's rows follow the data set, the preprocessing stays the version's."""
    first = house.store.get("fruit", house.worked(house.submit()).version)
    order = [2, 0, 1]
    tensors = {name: array[order] if name.startswith("head") else array for name, array in first.tensors.items()}
    sees = replace(first.manifest.preprocess, mean=(0.4, 0.5, 0.6))
    labels = tuple(first.manifest.labels[row] for row in order)
    version = house.store.put(Bundle.build(replace(first.manifest, labels=labels, preprocess=sees), tensors))
    job = condensed(house, version, epochs=1)
    found = house.store.get("fruit", job.version).manifest
    assert (found.labels, found.preprocess) == (("lemon", "lime", "plum"), sees)
    assert found.metrics["condense"]["val_accuracy"] == judged(house, version)


def judged(house: House, version: str) -> float:
    """On the pictures that a job holds out, asked through the server's own way from bundle to answer."""
    backbone = untrained()
    reader, recipe = DatasetReader(house.decoder(backbone.spec.geometry)), resolve({}, QUICK)
    batches = reader.validation(house.datasets.get(house.dataset), recipe, lambda: None)
    return evaluate(house.store.get("fruit", version), backbone, Registry(), batches).accuracy


@pytest.mark.parametrize("reached", [1, 2], ids=["in the fit", "in the condensation"])
def test_an_interrupted_condensation_goes_on_and_ends_with_the_same_version(
    house: House, monkeypatch: pytest.MonkeyPatch, reached: int
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY_S", 0.0)
    recipe = {**QUICK, "epochs": 3, "condense": {"keep": [0.25], "epsilon": 1.0, "epochs": 3}}
    undisturbed = house.worked(house.submit(recipe=recipe))
    job = house.submit(recipe=recipe)
    with monkeypatch.context() as patch:
        on_progress = Heartbeat.on_progress

        def failing(heartbeat: Heartbeat, progress: Progress) -> None:
            if (progress.epoch, progress.step, bool(progress.trial)) == (2, 1, reached == 2):
                raise RuntimeError("power cut")
            on_progress(heartbeat, progress)

        patch.setattr(Heartbeat, "on_progress", failing)
        assert house.worked(job).state == "queued"
    done = house.worked(job)
    assert (done.state, done.attempt) == ("succeeded", 2)
    epochs = [event.data["epoch"] for event in house.jobs.events(job.id) if event.type == "epoch"]
    assert epochs == [1, 2, 3], "no epoch is done twice"
    first, second = (house.store.get("fruit", one.version) for one in (undisturbed, done))
    assert all((first.tensors[name] == second.tensors[name]).all() for name in first.tensors)
    assert first.manifest.metrics == second.manifest.metrics
    assert not list((house.folder / "checkpoints").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("method", "version", "code"), [("linear", None, "invalid_request"), ("vpt_deep", "f" * 64, "version_not_found")]
)
def test_what_cannot_be_condensed_fails_at_once(house: House, method: str, version: str | None, code: str) -> None:
    job = house.worked(house.submit(method, recipe={**QUICK, "condense": {"version": version}}))
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, code)


# --- figures without a version ----------------------------------------------------------------------------------------

COMPARED = {"methods": ["linear", "vpt_deep", "partial-1"], "seeds": [0, 1], "recipe": {"epochs": 2, "prompts": 2}}


def compare(house: House, **changes: object) -> Job:
    wish = {"compare": {**COMPARED, **changes}}
    return house.jobs.submit("fruit", house.dataset, "compare", wish, publish="never", max_attempts=3)


def test_a_baseline_is_reported_and_not_stored(house: House) -> None:
    job = house.jobs.submit("fruit", house.dataset, "partial-1", QUICK, publish="never", max_attempts=3)
    job = house.worked(job)
    assert (job.state, job.version) == ("succeeded", None)
    assert {"val_accuracy", "parameters", "recipe", "seconds"} <= job.metrics.keys()
    assert job.metrics["published"] is False
    assert house.events(job) == ["queued", "started", "epoch", "epoch", "succeeded"]
    assert not house.store.tasks()
    assert not list((house.folder / "checkpoints").glob("*"))


def test_a_baseline_that_is_to_be_published_says_why_it_cannot(house: House) -> None:
    job = house.worked(house.submit("full"))
    assert (job.state, job.error["code"]) == ("failed", "method_not_servable")
    assert "every weight of the backbone" in job.error["detail"]


def test_a_comparison_tells_each_fit_and_ends_with_a_table(house: House) -> None:
    job = house.worked(compare(house))
    assert (job.state, job.version) == ("succeeded", None)
    found = job.metrics["compare"]
    assert [row["method"] for row in found["rows"]] == COMPARED["methods"]
    assert [row["servable"] for row in found["rows"]] == [True, True, False]
    assert all(row["fits"] == 2 and row["val_accuracy"] is not None for row in found["rows"])
    assert found["rows"][1]["lens_bytes"] > found["rows"][0]["lens_bytes"]
    assert house.events(job) == ["queued", "started", *["trial"] * 6, "succeeded"]
    assert (job.progress["trial"], job.progress["trials"]) in {(n, 6) for n in range(1, 7)}
    assert not house.store.tasks()


def test_a_comparison_that_is_given_back_fits_nothing_twice(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job, on_progress, seen = compare(house), Heartbeat.on_progress, []

    def watching(heartbeat: Heartbeat, progress: Progress) -> None:
        seen.append(progress.trial)
        if progress.trial_figures is not None and progress.trial == 3:
            house.trainer.stop.set()
        on_progress(heartbeat, progress)

    monkeypatch.setattr(Heartbeat, "on_progress", watching)
    assert house.worked(job).state == "queued"
    assert max(seen) == 3
    seen.clear()
    house.trainer = house.worker("w2")
    done = house.worked(job)
    assert done.state == "succeeded"
    assert min(seen) == 4
    assert [(one["method"], one["seed"]) for one in done.metrics["compare"]["fits"]] == [
        (method, seed) for seed in (0, 1) for method in COMPARED["methods"]
    ]


def test_a_comparison_is_cancelled_within_a_step(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat, "PERIOD_S", 0.01)
    during_the_first_step(monkeypatch, lambda: house.jobs.cancel(job.id))
    job = compare(house)
    assert house.worked(job).state == "cancelled"
    assert not list((house.folder / "checkpoints").glob("*"))
