"""The command line against a rack on a real socket: training, comparing, jobs."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.command_line import SCRIPT, Run, in_terminal
from tests.client.scripted_rack import VERSION, Rack


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
        assert f"job j1 succeeded: task trash has version {VERSION}" in done.stderr

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
