"""The servers that the HTTP benchmark compares with: they answer what they should, and hold what they are said to.

`LITSERVE_PYTHON` names a Python that has LitServe and what the server needs; without it that app is not tried.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from prompts_store import Bundle, open_store
from server.bench import http_targets, peers, synthetic_tasks
from server.bench.process_tree import MIB, memory
from server.engine import backbone as engine_backbone
from server.engine import reference

TASKS = synthetic_tasks.names(6)
PROMPTS = 2
BACKBONE = engine_backbone.load("untrained", device="cpu")
MODEL_MIB = sum(weight.nbytes for weight in BACKBONE.model.parameters()) / MIB


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('peers') / 'store'}"
    opened = open_store(url)
    for _ in synthetic_tasks.publish(opened, BACKBONE.spec, TASKS, "vpt_deep", PROMPTS):
        pass
    opened.close()
    return url


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic_tasks.pictures(None, tmp_path_factory.mktemp("pictures"), 2, side=100)


@pytest.fixture
def threads() -> Iterator[int]:
    """A peer sets how many this process has."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def options(store: str, threads: int, *more: str) -> argparse.Namespace:
    return peers.options(["fastapi", "--store", store, "--backbone", "untrained", "--threads", str(threads), *more])


def test_peers_answer_what_the_reference_answers(store: str, pictures: list[Path], threads: int) -> None:
    model, bundles = peers.loaded(options(store, threads)), live(store)
    for task, pixels, answer in answered(model, pictures):
        lengths = bundles[task].manifest.prompt_lengths
        check(answer, reference.vpt_deep(BACKBONE, pixels[None], params(bundles[task]), lengths)[0], bundles[task])


def test_models_of_their_own_answer_as_plain_fine_tuned_ones(store: str, pictures: list[Path], threads: int) -> None:
    model, bundles = peers.loaded(options(store, threads, "--own-models")), live(store)
    assert isinstance(model, peers.ModelPerTask)
    backbone = engine_backbone.load("untrained", device="cpu")
    for task, pixels, answer in answered(model, pictures):
        backbone.model = model.models[task]
        check(answer, reference.linear(backbone, pixels[None], params(bundles[task]))[0], bundles[task])


def test_models_of_their_own_share_no_weight(store: str, threads: int) -> None:
    models = peers.ModelPerTask(options(store, threads)).models
    assert tuple(models) == TASKS
    for first, other in combinations([BACKBONE.model, *models.values()], 2):
        pairs = list(zip(first.parameters(), other.parameters(), strict=True))
        assert not any(torch.equal(mine, theirs) for mine, theirs in pairs if mine.any())
    memory = {weight.untyped_storage().data_ptr() for model in models.values() for weight in model.parameters()}
    assert len(memory) == len(TASKS) * len(pairs)
    few = peers.ModelPerTask(options(store, threads, "--tasks", "2"))
    assert few.tasks == [*TASKS[:2]]


def test_a_process_grows_by_a_model_for_each_task(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENSRACK_BACKBONE", "untrained")
    result = http_targets.copies(sys.executable, store)
    assert result.tasks == len(TASKS)
    for first, every in zip(result.first, result.every, strict=True):  # in all, and own
        assert every - first == pytest.approx((len(TASKS) - 1) * MODEL_MIB, abs=MODEL_MIB)
    assert result.first.own < result.first.held


@pytest.mark.long
def test_all_servers_are_given_the_same_environment(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MALLOC_ARENA_MAX": "3", "OMP_WAIT_POLICY": "active", "LENSRACK_BACKBONE": "untrained"}.items():
        monkeypatch.setenv(name, value)
    with http_targets.ours("ours", tmp_path, store, "float32") as ours:
        environment = environments(ours.pid)
    with http_targets.fastapi(sys.executable, tmp_path, store, 1) as peer:
        others = environments(peer.pid)
    expected = {"LENSRACK_HOME", "LENSRACK_STORE", "LENSRACK_JOBS", "LENSRACK_WORKERS", "LENSRACK_DTYPE",
              "LENSRACK_SAMPLE_TASKS"}  # fmt: skip
    assert all(variables["MALLOC_ARENA_MAX"] == "3" for variables in [*environment, *others])
    assert {name for name, _ in environment[0].items() ^ others[0].items()} == expected


@pytest.mark.slow
def test_litserve_with_a_copy_a_task(
    store: str, pictures: list[Path], tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (python := os.environ.get("LITSERVE_PYTHON")) is None:
        pytest.skip("LITSERVE_PYTHON names no Python that has LitServe")
    monkeypatch.setenv("LENSRACK_BACKBONE", "untrained")
    http_targets.bodies(tmp_path, TASKS, pictures)
    how, model = http_targets.LitServe(python), peers.ModelPerTask(options(store, threads))
    with http_targets.litserve(how, tmp_path, store, model_per_task=True) as target:
        for task in TASKS:
            target.check(task)
        [answer, other] = (requested(target.port, task, pictures[0]) for task in TASKS[:2])
        all_mib = memory(target.pid).held
    [expected] = model.answer(TASKS[0], [model.decode(pictures[0].read_bytes())])
    assert scores(answer) == pytest.approx(scores(expected), abs=1e-5)
    assert scores(answer) != pytest.approx(scores(other), abs=1e-2)
    with http_targets.litserve(how, tmp_path, store, model_per_task=True, tasks=1) as target:
        target.check(TASKS[0])
        grown = all_mib - memory(target.pid).held
    assert grown == pytest.approx((len(TASKS) - 1) * MODEL_MIB, abs=2 * MODEL_MIB)


def requested(port: int, task: str, picture: Path) -> list[dict[str, Any]]:
    body = {"task": task, "image": base64.b64encode(picture.read_bytes()).decode()}
    answer = httpx.post(f"http://127.0.0.1:{port}/predict", json=body, timeout=60).raise_for_status().json()
    predictions: list[dict[str, Any]] = answer["predictions"][0]
    return predictions


def answered(model: peers.Model, pictures: list[Path]) -> list[tuple[str, Tensor, list[dict[str, Any]]]]:
    """A batch of mixed tasks and its answers."""
    picture, other = (model.decode(file.read_bytes()) for file in pictures)
    batch = [(TASKS[2], picture), (TASKS[0], other), (TASKS[5], picture), (TASKS[2], other)]
    answers = peers.by_task(batch, model)
    return [(task, pixels, answer) for (task, pixels), answer in zip(batch, answers, strict=True)]


def check(answer: list[dict[str, Any]], logits: Tensor, bundle: Bundle) -> None:
    """The best of a task's labels with their scores, as these logits [C] have them."""
    expected = logits.double().softmax(-1)
    assert answer[0]["index"] == int(expected.argmax())
    for first in answer:
        assert bundle.manifest.labels[first["index"]] == first["label"]
        np.testing.assert_allclose(first["score"], float(expected[first["index"]]), atol=1e-5)


def scores(answer: list[dict[str, Any]]) -> dict[str, float]:
    return {first["label"]: first["score"] for first in answer}


def live(store: str) -> dict[str, Bundle]:
    opened = open_store(store)
    result = {task: opened.get(task, opened.aliases(task)["live"].targets[0].version) for task in TASKS}
    opened.close()
    return result


def params(bundle: Bundle) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in bundle.tensors.items()}


def environments(pid: int) -> list[dict[str, str]]:
    """Of a server's processes, its first one's first."""
    root = psutil.Process(pid)
    return [each.environ() for each in (root, *root.children(recursive=True))]
