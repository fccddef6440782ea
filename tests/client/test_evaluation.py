"""A task's answers on a folder of class folders: figures, confusion, what is wrong and what is unreadable."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lensrack
from lensrack._evaluation import wilson
from tests.client.command_line import Run
from tests.client.scripted_rack import VERSION, Asked, Rack, Told, problem, told
from tests.client.ways import PIXELS, Make

# label of the folder -> answers of its pictures; the rack reads the answer off the picture's last byte
ANSWERS = {"glass": ["glass", "glass", "metal"], "metal": ["metal", "metal"], "Paper": ["paper"]}
LABELS = ("glass", "metal", "paper")


@pytest.fixture
def labelled(tmp_path: Path, rack: Rack) -> Path:
    """Six pictures in three folders, one of which is no class exactly, a broken picture, and what is left out."""
    for label, answers in ANSWERS.items():
        (tmp_path / "held" / label / "deep").mkdir(parents=True)
        for number, answer in enumerate(answers):
            path = tmp_path / "held" / label / ("deep" if number else "") / f"{number}.jpg"
            path.write_bytes(PIXELS + bytes([LABELS.index(answer)]))
    (tmp_path / "held" / "glass" / "empty.jpg").touch()
    (tmp_path / "held" / "notes.txt").write_text("none")
    (tmp_path / "held" / "stray.jpg").write_bytes(PIXELS)
    plain = rack.answer

    def answer(asked: Asked) -> Told:
        done = plain(asked)
        if asked.path != "/predict/trash" or done.status != 200:
            return done
        best = {"label": LABELS[asked.body[-1]], "index": 0, "score": 0.75}
        return replace(done, body=told({"task": "trash", "version": VERSION, "predictions": [[best]]}).body)

    rack.answer = answer  # type: ignore[method-assign]
    return tmp_path / "held"


def test_the_figures(make: Make, rack: Rack, labelled: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    scores = make().evaluate("trash", labelled, progress=lambda *at: seen.append(at))
    assert seen == [(number, 7) for number in range(1, 8)]
    assert (scores.images, scores.correct, scores.versions) == (6, 4, (VERSION,))
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.interval == pytest.approx((0.29999, 0.90323), abs=1e-4)  # R: binom::binom.wilson(4, 6)
    assert scores.confusion == {
        "Paper": {"paper": 1},
        "glass": {"glass": 2, "metal": 1},
        "metal": {"metal": 2},
    }
    by_label = {one.label: (one.images, one.correct, one.recall, one.precision) for one in scores.classes}
    assert by_label["glass"] == (3, 2, pytest.approx(2 / 3), 1.0)
    assert by_label["metal"] == (2, 2, 1.0, pytest.approx(2 / 3))
    assert by_label["paper"] == (0, 0, None, 0.0)
    assert [(one.image.name, one.label, one.answer) for one in scores.wrong] == [
        ("0.jpg", "Paper", "paper"),
        ("2.jpg", "glass", "metal"),
    ]
    [unreadable] = scores.unreadable
    assert (unreadable.image.name, "empty" in unreadable.error) == ("empty.jpg", True)
    assert scores.unknown_labels == ("Paper",)
    assert {path.name for path in scores.left_out.other} == {"notes.txt", "stray.jpg"}
    plain = json.loads(json.dumps(scores.to_dict()))
    assert (plain["accuracy"], plain["wrong"][0]["image"]) == (scores.accuracy, str(labelled / "Paper" / "0.jpg"))


@pytest.mark.parametrize(("correct", "images", "expected"), [(10, 10, (0.72247, 1.0)), (0, 10, (0.0, 0.27753))])
def test_the_interval_stays_within_zero_and_one(correct: int, images: int, expected: tuple[float, float]) -> None:
    assert wilson(correct, images) == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_evaluated(make: Make, rack: Rack, labelled: Path, tmp_path: Path) -> None:
    client = make()
    for folder, why in ((tmp_path / "none", "got .*none"), (labelled / "metal" / "deep", "no class folders")):
        with pytest.raises(lensrack.InvalidInput, match=why):
            client.evaluate("trash", folder)
    with pytest.raises(lensrack.InvalidInput, match=r"such as 'glass', 'metal', 'paper'; got 'held'"):
        client.evaluate("trash", tmp_path)
    with pytest.raises(lensrack.NotFoundError):
        client.evaluate("nothing", labelled)
    rack.misbehave("/predict/trash", *[problem(400, "bad_image", "truncated")] * 7)
    with pytest.raises(lensrack.InvalidInput, match=r"no picture of .* was answered; .*0\.jpg: truncated"):
        client.evaluate("trash", labelled)


def test_the_command(run: Run, labelled: Path, tmp_path: Path) -> None:
    done = run("evaluate", "trash", labelled, "--csv", "wrong.csv", code=1)  # one is unreadable
    heading, *rest = done.stdout.splitlines()
    assert heading == "accuracy 66.7% (4 of 6), 95 % interval 30.0% to 90.3% (Wilson)"
    table = [line.split() for line in rest]
    assert ["glass", "3", "2", "66.7%", "100.0%"] in table
    assert ["glass", "0", "2", "1", "0"] in table  # the confusion matrix: Paper, glass, metal, paper
    assert "2.jpg: glass, answered metal (0.75)" in done.stderr
    assert "no classes of the task, so never right: Paper" in done.stderr
    assert "left out: 2 not pictures (notes.txt, stray.jpg)" in done.stderr
    with (tmp_path / "wrong.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [(Path(row["image"]).name, row["answer"], bool(row["error"])) for row in rows] == [
        ("0.jpg", "paper", False),
        ("2.jpg", "metal", False),
        ("empty.jpg", "", True),
    ]
    assert "--force replaces it" in run("evaluate", "trash", labelled, "--csv", "wrong.csv", code=2).stderr
    assert json.loads(run("evaluate", "trash", labelled, "--json", code=1).stdout)["correct"] == 4
