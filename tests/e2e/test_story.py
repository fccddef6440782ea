"""The main job on real input: upload pictures, train a task, ask it; a second task beside it; a swap under load.

A pretrained DeiT-Tiny and two real data sets, a real server process, a real worker process, the command line and plain
HTTP as the README shows them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
import torch

from lensrack import Client
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training.data import LabelledImages, Source, Splits, hold_out, read_pictures
from server.training.fit import fit
from server.training.recipe import resolve
from tests.e2e.server_process import ServerProcess, environment, serving

pytestmark = [pytest.mark.shared, pytest.mark.long, pytest.mark.timeout(1200)]

PER_CLASS, EPOCHS, BATCH = 24, 5, 16
TRASH_CHANCE, SIGN_CHANCE = 1 / 6, 1 / 10


@pytest.fixture(scope="module")
def server(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    weights = shared / "weights" / "deit_tiny_patch16_224.fp16.safetensors"
    home = tmp_path_factory.mktemp("story")
    with serving(home, backbone="deit_tiny_patch16_224", backbone_weights=str(weights), worker_nice="0") as running:
        yield running


def lensrack(server: ServerProcess, *arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """The command line, as a person would call it."""
    return subprocess.run(
        [sys.executable, "-m", "lensrack.cli", *arguments],
        env={**environment(server.home, {}), "LENSRACK_URL": server.url},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.strip()


def labelled(folder: Path, per_class: int | None = None) -> list[tuple[str, Path]]:
    return [(label.name, file) for label in sorted(folder.iterdir()) for file in sorted(label.iterdir())[:per_class]]


def accuracy(server: ServerProcess, task: str, pictures: list[tuple[str, Path]]) -> float:
    with Client(server.url) as client:
        right = [client.predict(task, file, top_k=1).best.label == label for label, file in pictures]
    return float(np.mean(right))


@pytest.fixture(scope="module")
def trash_pictures(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_of(shared / "datasets" / "trashnet" / "train", tmp_path_factory.mktemp("trash") / "train", PER_CLASS)


@pytest.fixture(scope="module")
def trash(server: ServerProcess, trash_pictures: Path) -> str:
    """Steps 1 and 2: a folder becomes a data set, the data set a task. Returns the dataset's id."""
    dataset = good(lensrack(server, "datasets", "upload", str(trash_pictures)))
    options = ["--method", "vpt_deep", "--epochs", str(EPOCHS), "--batch-size", str(BATCH)]
    watched = lensrack(server, "train", "trash", "--dataset", dataset, *options, "--watch")
    good(watched)
    assert "accuracy" in (watched.stdout + watched.stderr).lower()
    return dataset


def test_the_task_answers_the_moment_its_job_succeeds(server: ServerProcess, shared: Path, trash: str) -> None:
    """Step 3, by the command line and by plain HTTP."""
    bottle = sorted((shared / "datasets" / "trashnet" / "test" / "glass").iterdir())[0]
    shown = json.loads(good(lensrack(server, "--json", "predict", "trash", str(bottle))))
    plain = httpx.post(
        f"{server.url}/predict/trash?top_k=6",
        content=bottle.read_bytes(),
        headers={"Content-Type": "image/jpeg"},
        timeout=60,
    )
    assert plain.status_code == 200, plain.text
    body = plain.json()
    assert {row["label"] for row in body["predictions"][0]} == {
        "cardboard", "glass", "metal", "paper", "plastic", "trash",
    }  # fmt: skip
    assert sum(row["score"] for row in body["predictions"][0]) == pytest.approx(1, abs=1e-6)
    assert body["predictions"][0][0]["label"] in json.dumps(shown)
    assert {"decode", "queue", "compute"} == {part.split(";")[0] for part in plain.headers["Server-Timing"].split(", ")}


def test_accuracy_is_well_above_chance_and_above_random_weights(
    server: ServerProcess, shared: Path, trash: str, trash_pictures: Path
) -> None:
    folder = shared / "datasets" / "trashnet"
    served = accuracy(server, "trash", labelled(folder / "test"))
    blind = accuracy_with_random_weights(trash_pictures, folder / "test")
    print(f"trashnet, vpt_deep, {EPOCHS} epochs: served {served:.3f}, random weights {blind:.3f}")
    assert served > 2.5 * TRASH_CHANCE
    assert served > blind + 0.1


def accuracy_with_random_weights(train: Path, test: Path) -> float:
    """The same network, method, recipe and pictures; only the pretraining is missing."""
    torch.manual_seed(0)
    backbone = Backbone.of("deit_tiny_patch16_224", timm.create_model("deit_tiny_patch16_224", num_classes=0))
    geometry = backbone.spec.geometry

    def pictures(folder: Path) -> LabelledImages:
        labels = sorted(path.name for path in folder.iterdir())
        files = labelled(folder)
        sources = [Source(file.read_bytes, labels.index(label)) for label, file in files]
        return read_pictures(sources, geometry, max_pixels=50_000_000)

    method = Registry().get("vpt_deep")
    recipe = resolve(method.defaults, {"epochs": EPOCHS, "batch_size": BATCH})
    fitted, held_out = hold_out(pictures(train), recipe.validation, recipe.seed)
    found = fit(backbone, method, Splits(fitted, held_out, pictures(test)), 6, recipe)
    return float(found.metrics["test_accuracy"])


def test_a_second_task_is_trained_while_the_first_is_asked(
    server: ServerProcess, shared: Path, trash: str, tmp_path: Path
) -> None:
    """Step 4: asking never stops, and then rows of both tasks share batches."""
    signs = few_of(shared / "datasets" / "sign_digits" / "train", tmp_path / "signs", 16)
    dataset = good(lensrack(server, "datasets", "upload", str(signs)))
    pictures = labelled(shared / "datasets" / "trashnet" / "test", 3)
    with Client(server.url) as client:
        job = client.train("signs", dataset, method="vpt_deep", recipe={"epochs": 6, "lr": 5e-3})
        asked = 0
        while not job.refresh().finished:
            for _, file in pictures:
                assert client.predict("trash", file).task == "trash"
                asked += 1
        assert job.refresh().state == "succeeded", job.refresh()
    assert asked > 20
    assert accuracy(server, "signs", labelled(shared / "datasets" / "sign_digits" / "test", 10)) > 3 * SIGN_CHANCE
    shared_batches(server, pictures)


def shared_batches(server: ServerProcess, pictures: list[tuple[str, Path]]) -> None:
    """Many clients ask both tasks at once: the forward's own count of tasks in a batch must see two."""
    before = batches_of_one_task(server)

    def ask(task: str) -> None:
        with Client(server.url) as client:
            for _, file in pictures:
                client.predict(task, file)

    threads = [threading.Thread(target=ask, args=(task,)) for task in ("trash", "signs") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = batches_of_one_task(server)
    assert after["all"] - before["all"] > after["one"] - before["one"], "no batch held rows of both tasks"


def batches_of_one_task(server: ServerProcess) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    found = {}
    for line in text.splitlines():
        if line.startswith('lensrack_batch_tasks_bucket{le="1.0"}'):
            found["one"] = float(line.split()[-1])
        if line.startswith("lensrack_batch_tasks_count"):
            found["all"] = float(line.split()[-1])
    return found


def few_of(source: Path, target: Path, per_class: int) -> Path:
    for label in source.iterdir():
        (target / label.name).mkdir(parents=True)
        for file in sorted(label.iterdir())[:per_class]:
            (target / label.name / file.name).write_bytes(file.read_bytes())
    return target


def test_swapping_a_version_under_load_gives_no_error_and_no_mixed_up_answer(
    server: ServerProcess, shared: Path, trash: str
) -> None:
    """Two versions with opposite labels in turn go live; every answer must be the one of the version it names."""
    with Client(server.url) as client:
        job = client.train("trash", trash, method="linear", recipe={"epochs": 30})
        job.wait(timeout=300)
        versions = [info.version for info in client.tasks.versions("trash")][:2]
        assert len(versions) == 2
        _, file = labelled(shared / "datasets" / "trashnet" / "test", 1)[0]
        truth = {version: scores(client, f"trash@{version}", file) for version in versions}
    assert truth[versions[0]] != truth[versions[1]], "the two versions must be told apart by their answers"
    seen: Counter[str] = Counter()
    problems: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        with Client(server.url, max_retries=0) as client:
            while not stop.is_set():
                try:
                    answer = client.predict("trash", file, top_k=6)
                except Exception as error:  # any error at all fails the test
                    problems.append(repr(error))
                    return
                seen[answer.version] += 1
                found = {row.label: row.score for row in answer.predictions}
                if any(abs(found[label] - score) > 1e-4 for label, score in truth[answer.version].items()):
                    problems.append(f"{answer.version[:8]} answered {found}")

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    with Client(server.url) as client:
        for turn in range(30):
            client.tasks.set_alias("trash", "live", versions[turn % 2])
            time.sleep(0.1)
            assert client.predict("trash", file).version == versions[turn % 2], "the new version answers at once"
    stop.set()
    for asker in askers:
        asker.join()
    assert not problems, problems[:5]
    assert len(seen) == 2
    assert min(seen.values()) > 5


def scores(client: Client, task: str, file: Path) -> dict[str, float]:
    return {row.label: row.score for row in client.predict(task, file, top_k=6)}


def test_the_server_said_nothing_alarming(server: ServerProcess, trash: str) -> None:
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log
