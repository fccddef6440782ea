"""A run from end to end on a small teacher: it learns, it can be killed anywhere, and it ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from server.pretraining import photos
from server.pretraining.distil import agreement, loss, scale, states
from server.pretraining.run import Phase, Run, RunFolder, plan
from tests.e2e.doomed_worker import forge

PHASES = (Phase("blocks", 16, 4, 3), Phase("whole", 16, 4, 5), Phase("whole", 32, 4, 4))
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(seed: int, classes: int) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(**SHAPE, num_classes=classes, dynamic_img_size=True)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return model


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Image.Image], list[Image.Image]]:
    return photos.load()[:4], photos.load(held_out=True)


def run(place: Path, pictures: tuple[list[Image.Image], list[Image.Image]], rate: float = 1e-3) -> Run:
    teacher, student, device = vit(0, 5), vit(1, 0), torch.device("cpu")
    with patch.multiple("server.pretraining.run", HELD_OUT_VIEWS=8, SCALE_VIEWS=8):
        return Run(student, teacher, pictures, PHASES, RunFolder(place), rate=rate, seed=2, keep_every=3, device=device)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, pictures: tuple[list[Image.Image], list[Image.Image]]) -> Path:
    """The folder of a run that nothing happened to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calm")
    run(folder, pictures).go({"lensrack": "{}"})
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_it_goes_to_its_end_and_leaves_weights_and_curves(calm: Path) -> None:
    weights = load_file(calm / "backbone.safetensors")
    assert set(weights) == set(vit(1, 0).state_dict())
    assert {value.dtype for value in weights.values()} == {torch.float16}
    curves = [json.loads(line) for line in (calm / "curves.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curves] == [3, 6, 9, 12]
    assert all(len(point["states"]) == SHAPE["depth"] + 1 for point in curves)


def _doomed(place: Path, pictures: tuple[list[Image.Image], list[Image.Image]], at: int) -> None:
    torch.set_num_threads(1)
    steps = 0

    class Doomed(Run):
        def _step(self, *arguments):  # type: ignore[no-untyped-def]
            nonlocal steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._step(*arguments)

    whole = run(place, pictures)
    whole.__class__ = Doomed
    whole.go({})


@pytest.mark.parametrize("at", [2, 5, 11])
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, calm: Path, pictures: tuple[list[Image.Image], list[Image.Image]], at: int
) -> None:
    process = forge().Process(target=_doomed, args=(tmp_path, pictures, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    run(tmp_path, pictures).go({"lensrack": "{}"})
    first, second = ((folder / "backbone.safetensors").read_bytes() for folder in (calm, tmp_path))
    assert first == second


@pytest.mark.parametrize("objective", ["blocks", "whole"])
def test_the_teacher_itself_has_nothing_to_learn(objective: str) -> None:
    teacher, images = vit(0, 5), torch.randn(3, 3, 32, 32)
    result, errors = loss(objective, teacher, teacher, images, scale(teacher, images))
    assert result.item() == pytest.approx(0, abs=1e-6)
    assert errors.tolist() == pytest.approx([0] * 3, abs=1e-6)


def test_blocks_are_taught_each_by_itself() -> None:
    """What one block gets wrong reaches no other: the second block's error is that of the teacher's own input."""
    teacher, student, images = vit(0, 5), vit(1, 0), torch.randn(3, 3, 32, 32)
    student.blocks[1].load_state_dict(teacher.blocks[1].state_dict())
    _, errors = loss("blocks", student, teacher, images, scale(teacher, images))
    assert errors[0] > 0.1
    assert errors[1] > 0.001
    assert errors[2].item() == pytest.approx(0, abs=1e-6)


def test_states_are_those_of_the_forward() -> None:
    model, images = vit(0, 5).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.norm(states(model, images)[-1]), model.forward_features(images))


@pytest.mark.parametrize("objective", ["blocks", "whole"])
def test_a_student_comes_closer(objective: str, tmp_path: Path) -> None:
    teacher, student, images = vit(0, 5), vit(1, 0), torch.randn(16, 3, 32, 32)
    teacher_scale = scale(teacher, images)
    before = agreement(student, teacher, images, teacher_scale)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(objective, student, teacher, images, teacher_scale)[0].backward()
        optimizer.step()
    after = agreement(student, teacher, images, teacher_scale)
    assert after["error"] < 0.5 * before["error"]
    assert after["divergence"] < before["divergence"]
    assert after["cosine"] > before["cosine"]


def test_the_rate_rises_shortly_and_falls_to_nothing() -> None:
    steps = plan([Phase("whole", 16, 2, 500), Phase("whole", 32, 2, 500)])
    rates = [step.rate for step in steps]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < 0.05
    assert 0.9 < rates[peak] <= 1
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01
    assert steps[500].first == steps[0].first + 1000
    assert steps[500].done == pytest.approx(0.2)  # a quarter of the pixels


@pytest.mark.parametrize(
    "text", ["whole:112:32", "whole:112:32:1:2", "other:112:32:10", "whole:a:32:10", "whole:-1:2:3", ""]
)
def test_a_phase_says_what_it_expects(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected blocks\|whole:SIZE:BATCH:STEPS, got"):
        Phase.of(text)
    assert Phase.of("whole:112:32:10") == Phase("whole", 112, 32, 10)
