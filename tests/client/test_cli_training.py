"""The command line against a rack on a real socket: training, comparing, jobs."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.client.command_line import SCRIPT, Run, in_terminal
from tests.client.scripted_rack import VERSION, Rack, problem
from tests.client.scripted_rack import told as answer


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell makes what it runs in the background ignore SIGINT, and children would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestTraining:
    def test_a_job_is_started(self, run: Run, rack: Rack) -> None:
        options = ["--dataset", "d1", "--method", "linear", "--epochs", 3, "--lr", 0.5, "--prompts", 7, "--seed", 1]
        assert run("train", "trash", *options, "--optimizer", "sgd", "--batch-size", 8).stdout == "j1\n"
        recipe = {"epochs": 3, "batch_size": 8, "optimizer": "sgd", "lr": 0.5, "prompts": 7, "seed": 1}
        wishes = {"publish": "always", "priority": 0}
        assert rack.asked[0].json() == {
            "task": "trash", "dataset": "d1", "method": "linear", "recipe": recipe, **wishes,
        }  # fmt: skip

    def test_publishing_and_priority(self, run: Run, rack: Rack) -> None:
        run("train", "trash", "--dataset", "d1", "--publish", "if_better", "--priority", "-7")
        asked = rack.asked[0].json()
        assert (asked["publish"], asked["priority"]) == ("if_better", -7)

    def test_a_version_that_did_not_go_live_is_said(self, run: Run, rack: Rack) -> None:
        run("train", "trash", "--dataset", "d1", "--publish", "never")
        rack.jobs["j1"]["metrics"] = {"published": False}
        assert "it is not live: the job's --publish was never" in run("jobs", "watch", "j1").stderr

    def test_condensing(self, run: Run, rack: Rack) -> None:
        assert run("condense", "trash", "--keep", 0.1, "--keep", 0.3, "--epochs", 2).stdout == "j1\n"
        asked = rack.asked[-1].json()
        assert asked["recipe"] == {"condense": {"version": "live", "keep": [0.1, 0.3], "epochs": 2}}
        assert "dataset" not in asked
        rack.jobs["j1"]["metrics"] = {"condense": {"kept": 12, "prompts": 120}}
        assert "it keeps 12 of 120 prompts" in run("jobs", "watch", "j1").stderr
        rack.jobs["j1"]["metrics"] = {"published": False, "condense": {"kept": None, "prompts": 120, "version": "v"}}
        told = run("jobs", "watch", "j1").stderr
        assert "no smaller share of its prompts was good enough" in told
        assert "it is not live" not in told
        run("train", "trash", "--dataset", "d1", "--method", "vpt_deep", "--condense")
        assert rack.asked[-1].json()["recipe"] == {"condense": {}}

    def test_every_hyper_parameter_has_its_option(self, run: Run) -> None:
        from lensrack.wire import Recipe

        text = run("train", "--help").stdout
        assert [name for name in Recipe.model_fields if f"--{name.replace('_', '-')}" not in text] == []

    def test_watching_to_the_end(self, run: Run) -> None:
        done = run("train", "trash", "--dataset", "d1", "--watch")
        assert done.stdout == "j1\n"
        assert "epoch 1/2  loss 1.0000  validation accuracy 80.0%  1:00 left" in done.stderr
        last = f"trash: version {VERSION[:12]} is trained; ask it: `lensrack predict trash IMAGE`"
        assert done.stderr.splitlines()[-1] == last

    def test_comparing_methods(self, run: Run, rack: Rack, tmp_path: Path) -> None:
        options = ("--dataset", "d1", "--method", "linear", "--method", "vpt_deep", "--seed", "4", "--epochs", "2")
        done = run("compare", "trash", *options, "--picture", "compared.svg")
        asked = rack.to("/compare")[0].json()
        assert (asked["methods"], asked["seeds"], asked["recipe"]) == (["linear", "vpt_deep"], [4], {"epochs": 2})
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["method", "accuracy", "parameters", "bundle", "lens", "forward", "fit", "CPU"]
        assert [line.split()[0] for line in lines[1:]] == ["vpt_deep", "linear", "full"], "the best first"
        assert "80.0 ± 1.0" in lines[2]
        assert "90.0 (1 of 2 diverged)" in lines[1]
        assert "diverged" in lines[3]
        assert "vpt_deep" in (tmp_path / "compared.svg").read_text()

    def test_a_comparison_can_be_left_and_looked_at_later(self, run: Run) -> None:
        job = run("compare", "trash", "--dataset", "d1", "--detach").stdout.strip()
        assert "there is no table yet" in run("comparison", job).stderr
        run("jobs", "watch", job)
        assert json.loads(run("comparison", job, "--json").stdout)["rows"][0]["method"] == "linear"

    def test_a_bar_where_somebody_looks(self, environment: dict[str, str]) -> None:
        code, text = in_terminal([SCRIPT, "train", "trash", "--dataset", "d1", "--watch"], environment)
        assert code == 0
        assert "validation accuracy 80.0%" in text
        assert "\x1b[" in text  # the bar is redrawn in place

    def test_a_job_that_fails(self, run: Run, rack: Rack) -> None:
        rack.job_plan = ("failed", 1)
        done = run("train", "trash", "--dataset", "d1", "--watch", code=1)
        assert done.stderr.splitlines()[-1] == "error: job j1 failed: one class only (bad_dataset)"

    @pytest.mark.usefixtures("interruptible")
    def test_interrupting_leaves_the_job_alone(self, environment: dict[str, str], rack: Rack) -> None:
        rack.job_plan = ("running", 1)
        watching = subprocess.Popen(
            [SCRIPT, "train", "trash", "--dataset", "d1", "--watch"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert watching.stderr is not None
        assert "queued" in watching.stderr.readline()
        watching.send_signal(signal.SIGINT)
        _, told_last = watching.communicate(timeout=120)
        assert watching.returncode == 130
        assert "job j1 continues: `lensrack jobs watch j1` or `lensrack jobs cancel j1`" in told_last
        assert "Traceback" not in told_last
        assert not rack.to("/train/j1/cancel")

    def test_jobs(self, run: Run, rack: Rack) -> None:
        run("train", "trash", "--dataset", "d1")
        assert run("jobs").stdout.splitlines()[1].split()[:4] == ["j1", "trash", "auto", "queued"]
        run("jobs", "list", "--task", "trash", "--state", "running", "--limit", 1)
        assert rack.asked[-1].params == {"limit": "1", "task": "trash", "state": "running"}
        assert json.loads(run("jobs", "show", "j1", "--json").stdout)["id"] == "j1"
        assert "succeeded" in run("jobs", "watch", "j1").stderr
        assert "cancelled" in run("jobs", "cancel", "j1").stderr

    @pytest.mark.parametrize(
        "option",
        [
            ("--epochs", "0"),
            ("--epochs", "many"),
            ("--optimizer", "magic"),
            ("--publish", "maybe"),
            ("--priority", "101"),
        ],
    )
    def test_a_wrong_recipe_is_a_wrong_command(self, run: Run, rack: Rack, option: tuple[str, str]) -> None:
        assert option[0].strip("-") in run("train", "trash", "--dataset", "d1", *option, code=2).stderr
        assert not rack.asked


def event(kind: str, **data: object) -> dict[str, object]:
    return {"seq": 1, "type": kind, "at": 1.0, "data": data}


class TestASearchIsWatched:
    TRIAL: ClassVar = {
        "trials": 7, "method": "vpt_deep", "rung": 1, "lr": 0.003, "prompts": 10, "optimizer": "adamw", "epochs": 4,
        "val_images": 54, "forward_passes": 90,
    }  # fmt: skip
    OUTCOMES: ClassVar = (
        {"weight_decay": 0.01, "val_accuracy": 0.75, "val_nll": 0.61234, "val_interval": [0.62, 0.85]},
        {"weight_decay": 0.0001, "val_accuracy": 0.7, "val_nll": 0.51234, "val_interval": [0.57, 0.8]},
        {"weight_decay": 0.1, "val_accuracy": None, "val_nll": None, "val_interval": None},
    )

    def test_every_line_says_what_decides_and_the_last_what_to_do_next(self, run: Run, rack: Rack) -> None:
        judged = {
            "new": {"accuracy": 0.92, "nll": 0.3, "images": 54},
            "live": {"version": "b" * 64, "accuracy": 0.931, "nll": 0.2, "images": 54},
        }
        told = [
            event("started"),
            event("trial", trial=1, **self.TRIAL, **self.OUTCOMES[0]),
            event("trial", trial=2, **self.TRIAL, **self.OUTCOMES[1]),
            event("published", version="a" * 64, preliminary=True, val_accuracy=0.7, val_interval=[0.57, 0.8]),
            event("epoch", epoch=1, epochs=2, loss=1.0, val_accuracy=0.8, val_nll=0.5, share=0.625, eta_s=60.0),
            event("kept", version="c" * 64, reason="not_better", **judged),
            event("succeeded"),
        ]
        run("train", "trash", "--dataset", "d1", "--publish", "if_better")
        rack.events["j1"] = [one | {"seq": seq} for seq, one in enumerate(told, 1)]
        val = {"accuracy": 0.92, "interval": [0.82, 0.97], "images": 54}
        rack.jobs["j1"]["metrics"] = {"published": False, "judged": judged, "val": val}
        lines = run("jobs", "watch", "j1").stderr.splitlines()
        settings = "vpt_deep  optimizer adamw  lr 0.003"
        decided = "validation accuracy 92.0% against 93.1% of the version that was live, on the same 54 images"
        assert lines == [
            "trash: started",
            f"trash: trial 1/7  {settings}  weight decay 0.01  prompts 10  validation loss 0.6123  "
            "validation accuracy 75.0% (95% interval 62-85%, 54 images)",
            f"trash: trial 2/7  {settings}  weight decay 0.0001  prompts 10  validation loss 0.5123  "
            "validation accuracy 70.0% (95% interval 57-80%, 54 images)",
            "trash: a preliminary version answers while training goes on: `lensrack predict trash IMAGE`  "
            "validation accuracy 70.0%",
            "trash: epoch 1/2  loss 1.0000  validation loss 0.5000  validation accuracy 80.0%  62% done  1:00 left",
            f"trash: version {'c' * 12} is stored and not live  {decided}",
            "trash: succeeded",
            f"it is not live: the job's --publish was if_better, {decided}",
            "trash: validation accuracy 92.0% (95% interval 82-97%, 54 images); "
            f"ask it: `lensrack predict trash@{VERSION[:12]} IMAGE`",
        ]

    def test_the_progress_is_a_line_between_events(self, run: Run, rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lensrack._progress.LINE_EVERY_S", 0.0)
        run("train", "trash", "--dataset", "d1")
        page = {"events": [], "next": 0, "finished": False}
        shown = [
            {"phase": "reading"},
            {"phase": "features", "share": 0.1, "trial": 1, "trials": 7, "eta_s": 75.0},
            {"phase": "search", "share": 0.5, "trial": 2, "trials": 7, "epoch": 3, "epochs": 4, "loss": 0.5},
            {"phase": "publish", "share": 1.0},
        ]
        rack.misbehave("/train/j1/events", *(answer({**page, "progress": one}) for one in shown))
        lines = run("jobs", "watch", "j1").stderr.splitlines()
        assert lines[:4] == [
            "trash: reading the images",
            "trash: trial 1/7  caching features  10% done  1:15 left",
            "trash: trial 2/7  epoch 3/4  loss 0.5000  50% done",
            "trash: evaluating and publishing  100% done",
        ]
        assert float(rack.to("/train/j1/events")[0].params["wait_s"]) <= 1

    def test_a_job_shows_its_trials_with_what_differs_and_what_decided(self, run: Run, rack: Rack) -> None:
        run("train", "trash", "--dataset", "d1")
        trials = [{**self.TRIAL, **outcome} for outcome in self.OUTCOMES]
        rack.jobs["j1"] |= {"state": "succeeded", "metrics": {"search": {"trials": trials, "chosen": 2}}}
        done = run("jobs", "show", "j1")
        assert [line.split() for line in done.stdout.splitlines()[-4:]] == [
            ["trial", "rung", "method", "weight", "decay", "validation", "loss", "accuracy", "95%", "interval"],
            ["1", "1", "vpt_deep", "0.01", "0.6123", "75.0%", "62-85%"],
            ["2", "1", "vpt_deep", "0.0001", "0.5123", "70.0%", "57-80%", "fitted", "in", "full"],
            ["3", "1", "vpt_deep", "0.1", "-", "diverged", "-"],
        ]
        assert "the search goes by the validation loss, among trials of one rung" in done.stderr
        assert "on 54 validation images an accuracy is uncertain by up to ± 13 points" in done.stderr


def test_feedback_that_training_leaves_out_is_said(run: Run, rack: Rack, tmp_path: Path) -> None:
    (tmp_path / "owl.png").write_bytes(b"a picture")
    item = {"sha256": "ab" * 32, "label": "owl", "bytes": 9, "width": 3, "height": 2, "at": 1.0}
    warning = {"code": "rare_label", "text": "the new class 'owl' has 1 picture so far"}
    stored = {"task": "trash", "items": [item], "warnings": [warning]}
    rack.misbehave("/tasks/trash/feedback", answer(stored, 201), answer({**stored, "images": 1, "labels": {"owl": 1}}))
    done = run("feedback", "trash", "owl.png", "--label", "owl", "--new-label")
    assert done.stderr.splitlines() == ["owl.png: owl", "warning: the new class 'owl' has 1 picture so far"]
    assert run("feedback", "trash").stderr.splitlines()[-1] == "warning: the new class 'owl' has 1 picture so far"
    rack.misbehave("/tasks/trash/feedback/dataset", problem(409, "nothing_new", "nothing is new; left out: 1"))
    done = run("datasets", "from-feedback", "trash", code=1)
    assert (done.stdout, done.stderr.partition(" - ")[0]) == ("", "error: nothing_new: nothing is new; left out: 1")
