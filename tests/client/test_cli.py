"""The command line against a rack on a real socket; where it matters the console script, in a process of its own."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from lensrack.cli import app, main
from tests.client.scripted_rack import VERSION, Rack, Told, problem, serve, told

SCRIPT = Path(sys.executable).with_name("lensrack")
PIXELS = b"\xff\xd8\xff" + b"not much of a jpeg"
Run = Callable[..., "Done"]


@pytest.fixture
def rack() -> Rack:
    return Rack()


@pytest.fixture
def url(rack: Rack) -> Iterator[str]:
    with serve(rack) as url:
        yield url


@pytest.fixture
def environment(url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LENSRACK_")}
    return {**kept, "LENSRACK_URL": url, "COLUMNS": "200"}


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


@pytest.fixture
def run(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """The command line in this process, with an environment of its own: a process for each would take a second."""

    def run(*arguments: object, code: int = 0, **options: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as outside:
            outside.chdir(tmp_path)
            outside.setattr(os, "environ", {**environment, **options})
            outside.setattr(sys, "argv", ["lensrack", *map(str, arguments)])
            try:
                main()
                left = 0
            except SystemExit as leaving:
                left = leaving.code or 0
        done = Done(*capsys.readouterr())
        assert left == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def script(environment: dict[str, str], tmp_path: Path) -> Run:
    """The real console script, in a process of its own."""

    def script(*arguments: object, code: int = 0, **options: str) -> Done:
        done = subprocess.run(
            [SCRIPT, *map(str, arguments)],
            capture_output=True,
            check=False,
            text=True,
            env={**environment, **options},
            cwd=tmp_path,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return Done(done.stdout, done.stderr)

    return script


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bottle.jpg"
    path.write_bytes(PIXELS)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bottles" / "glass").mkdir(parents=True)
    (tmp_path / "bottles" / "glass" / "0.jpg").write_bytes(PIXELS)
    return tmp_path / "bottles"


class TestReading:
    def test_health(self, run: Run, rack: Rack) -> None:
        assert "tiny (trained) on cpu, float32" in run("health").stdout
        rack.misbehave("/readyz", told({"ready": False, "checks": {"store": "away"}}, 503))
        assert "away" in run("health", code=1).stdout

    @pytest.mark.parametrize("arguments", [("tasks",), ("tasks", "list")])
    def test_tasks(self, run: Run, arguments: tuple[str, ...]) -> None:
        heading, *rows = run(*arguments).stdout.splitlines()
        assert not any(line.endswith(" ") for line in (heading, *rows))
        assert heading.split() == ["task", "live", "versions", "resident"]
        assert [row.split() for row in rows] == [
            ["signs", VERSION[:12], "1", "yes"],
            ["trash", VERSION[:12], "1", "yes"],
        ]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (("tasks", "show", "trash"), "alias live"),
            (("versions", "trash"), "val_accuracy 0.9"),
            (("datasets",), "d1"),
            (("datasets", "show", "d1"), "train/glass"),
        ],
    )
    def test_views(self, run: Run, arguments: tuple[str, ...], expected: str) -> None:
        assert expected in run(*arguments).stdout

    @pytest.mark.parametrize("arguments", [("--json", "tasks"), ("tasks", "--json"), ("tasks", "list", "--json")])
    def test_json_anywhere(self, run: Run, arguments: tuple[str, ...]) -> None:
        assert [task["task"] for task in json.loads(run(*arguments).stdout)] == ["signs", "trash"]

    def test_nothing_there_is_said_beside_the_answer(self, run: Run, rack: Rack) -> None:
        rack.tasks.clear()
        done = run("tasks")
        assert (done.stdout, "no tasks yet" in done.stderr) == ("", True)

    def test_a_label_cannot_play_with_the_terminal(self, run: Run, rack: Rack) -> None:
        rack.tasks = {"\x1b[31mred[/bold]"}
        assert "\N{REPLACEMENT CHARACTER}[31mred[/bold]" in run("tasks").stdout


class TestChanging:
    def test_aliases(self, run: Run, rack: Rack) -> None:
        assert VERSION[:12] in run("alias", "trash", "live", VERSION, "--weight", "0.1").stdout
        assert rack.asked[-1].json() == {"version": VERSION, "weight": 0.1}
        assert json.loads(run("rollback", "trash", "--json").stdout)["revision"] == 3
        assert "precondition_failed" in run("alias", "trash", "live", VERSION, "--if-match", '"1"', code=1).stderr

    def test_deleting(self, run: Run, rack: Rack) -> None:
        run("tasks", "delete", "signs")
        assert rack.tasks == {"trash"}
        assert "deleted" in run("datasets", "delete", "d1").stderr

    def test_bundles(self, run: Run, rack: Rack, tmp_path: Path) -> None:
        name = run("bundle", "download", "trash").stdout.strip()
        assert name == f"trash-{VERSION[:12]}.safetensors"
        assert (tmp_path / name).read_bytes() == b"a bundle"
        assert run("bundle", "upload", "trash", name, "--alias", "live").stdout.strip() == VERSION
        assert "File exists" in run("bundle", "download", "trash", code=1).stderr
        run("bundle", "download", "trash", VERSION, "--force")


class TestFeedback:
    def test_saying_and_seeing(self, run: Run, rack: Rack, image: Path) -> None:
        said = run("feedback", "trash", image, image, "--label", "glass")
        assert (said.stdout, said.stderr.count("bottle.jpg: glass, before metal")) == ("", 2)
        assert [asked.params for asked in rack.asked] == [{"label": "glass"}] * 2
        run("feedback", "trash", image, "--label", "tin", "--new-label")
        assert rack.asked[-1].params == {"label": "tin", "new_label": "true"}
        assert run("feedback", "trash").stdout.split() == ["label", "images", "glass", "1"]
        assert json.loads(run("feedback", "trash", "--json").stdout)["images"] == 1
        assert "withdrawn" in run("feedback", "trash", "--withdraw", "ab" * 32).stderr
        assert rack.asked[-1].method == "DELETE"

    def test_half_a_word_is_not_sent(self, run: Run, rack: Rack, image: Path) -> None:
        for arguments in ((image,), ("--label", "glass")):
            assert "give images and their --label" in run("feedback", "trash", *arguments, code=2).stderr
        assert not rack.asked

    def test_a_dataset_of_it(self, run: Run, rack: Rack) -> None:
        assert run("datasets", "from-feedback", "trash", "--name", "better").stdout == "d1\n"
        assert (rack.asked[-1].path, rack.asked[-1].params) == ("/tasks/trash/feedback/dataset", {"name": "better"})


class TestDatasets:
    def test_an_upload_prints_nothing_but_the_id(self, run: Run, rack: Rack, folder: Path) -> None:
        done = run("datasets", "upload", folder)
        assert done.stdout == "d1\n"
        assert "5 images in 2 classes" in done.stderr
        assert "train: glass 3, metal 2" in done.stderr
        assert "glass/broken.jpg: truncated" in done.stderr
        [asked] = rack.asked
        assert asked.params == {"name": "bottles"}
        with zipfile.ZipFile(io.BytesIO(asked.body)) as archive:
            assert archive.namelist() == ["glass/0.jpg"]

    @pytest.mark.parametrize("command", [("upload", "bottles"), ("show", "d1")])
    def test_the_report_is_told_to_people(self, run: Run, folder: Path, command: tuple[str, str]) -> None:
        done = run("datasets", *command)
        told = " ".join((done.stdout + done.stderr).split())
        for fact in ("24 / 30.5 / 2048", "24 B / 30 B / 2.0 KiB", "RGB 4, L 1"):
            assert fact in told
        assert re.search("repeated in train:? 3", told)
        assert "formats" not in told
        assert "warning: 1 picture is in train and in test as well (leakage)" in done.stderr
        assert "in several splits: train/glass: glass/1.jpg | test/glass: test/glass/1.jpg" in done.stderr

    def test_the_id_in_a_shell_variable(self, environment: dict[str, str], folder: Path) -> None:
        line = f'ID=$({SCRIPT} datasets upload {folder} --name kitchen); echo "<$ID>"'
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout == "<d1>\n"

    def test_more_for_a_dataset(self, run: Run, rack: Rack, folder: Path) -> None:
        assert run("datasets", "add", folder, "--parent", "d1").stdout == "d1\n"
        assert rack.asked[-1].params == {"parent": "d1"}
        assert "--parent" in run("datasets", "add", folder, code=2).stderr

    def test_a_large_archive_goes_on_where_it_broke_off(self, run: Run, rack: Rack, tmp_path: Path) -> None:
        with (tmp_path / "large.zip").open("wb") as file:
            file.write(b"PK\x03\x04")
            file.truncate(20 * 2**20)
        rack.misbehave("/uploads/u1", problem(507, "disk_full", "the disk is full"))
        failed = run("datasets", "upload", "large.zip", code=1)
        assert (failed.stdout, "disk_full: the disk is full" in failed.stderr) == ("", True)
        assert "run the same command with --resume u1 to continue" in failed.stderr
        assert run("datasets", "upload", "large.zip", "--resume", "u1").stdout == "d1\n"
        assert rack.uploads["u1"].offset == 20 * 2**20
        assert len(rack.to("/uploads")) == 1

    def test_an_archive_from_stdin(self, environment: dict[str, str], rack: Rack) -> None:
        data = b"PK\x03\x04" + bytes(1000)
        command = [SCRIPT, "datasets", "upload", "-", "--name", "piped"]
        done = subprocess.run(command, input=data, capture_output=True, env=environment, check=True)
        assert (done.stdout, rack.asked[0].body, rack.asked[0].params) == (b"d1\n", data, {"name": "piped"})

    def test_what_is_no_dataset(self, run: Run, rack: Rack, image: Path) -> None:
        assert "bottle.jpg is not an archive" in run("datasets", "upload", image, code=2).stderr
        assert "No such file" in run("datasets", "upload", "nowhere", code=2).stderr
        assert not rack.asked


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
        code, text = _in_terminal([SCRIPT, "train", "trash", "--dataset", "d1", "--watch"], environment)
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


class TestPredictions:
    def test_one_image(self, run: Run, image: Path) -> None:
        heading, *rows = run("predict", "trash", image, "--top-k", 2).stdout.splitlines()
        assert heading.split() == ["image", "label", "score"]
        assert [row.split()[-2:] for row in rows] == [["glass", "0.7000"], ["metal", "0.3500"]]

    def test_json(self, run: Run, image: Path) -> None:
        [answer] = json.loads(run("predict", "trash", image, "--top-k", 1, "--json").stdout)
        best = {"label": "glass", "index": 0, "score": 0.7}
        assert answer == {"image": str(image), "task": "trash", "version": VERSION, "predictions": [best]}

    def test_one_bad_image_does_not_spoil_the_others(self, run: Run, rack: Rack, image: Path, tmp_path: Path) -> None:
        (tmp_path / "other.jpg").write_bytes(PIXELS)
        rack.misbehave("/predict/trash", problem(400, "bad_image", "truncated"))
        done = run("predict", "trash", image, tmp_path / "other.jpg", "--top-k", 1, code=1)
        assert len(done.stdout.splitlines()) == 2
        assert "error: " in done.stderr
        assert "bad_image: truncated - check that the file opens" in done.stderr


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestFolders:
    """A folder into a CSV, and going on where it broke off."""

    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        """Five pictures, one of them with a name that needs quotes, and what is none of them."""
        for name in ("a.jpg", "b/1.PNG", "b/2.webp", 'c/odd, "name".bmp', "c/last.jpeg"):
            path = tmp_path / "pictures" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PIXELS)
        (tmp_path / "pictures" / "notes.txt").write_text("none")
        (tmp_path / "pictures" / ".hidden.jpg").write_bytes(PIXELS)
        (tmp_path / "pictures" / "link.jpg").symlink_to(tmp_path / "pictures" / "a.jpg")
        return tmp_path / "pictures"

    def names(self, pictures: Path) -> list[str]:
        return [str(pictures / name) for name in ("a.jpg", "b/1.PNG", "b/2.webp", "c/last.jpeg", 'c/odd, "name".bmp')]

    def test_every_picture_has_its_row(self, run: Run, pictures: Path, tmp_path: Path) -> None:
        run("predict", "trash", pictures, "--csv", "out.csv", "--top-k", 2)
        rows = rows_of(tmp_path / "out.csv")
        assert [row["image"] for row in rows] == self.names(pictures)
        first = {"task": "trash", "version": VERSION, "label": "glass", "score": "0.7", "error": ""}
        assert all(row.items() >= {**first, "label_2": "metal", "score_2": "0.35"}.items() for row in rows)

    def test_a_folder_to_the_terminal(self, run: Run, pictures: Path, tmp_path: Path) -> None:
        told = json.loads(run("predict", "trash", pictures, "--json").stdout)
        assert [one["image"] for one in told] == self.names(pictures)
        (tmp_path / "empty").mkdir()
        assert "got none" in run("predict", "trash", tmp_path / "empty", code=2).stderr

    def test_an_image_without_an_answer_is_asked_again(
        self, run: Run, rack: Rack, pictures: Path, tmp_path: Path
    ) -> None:
        rack.misbehave("/predict/trash", problem(400, "bad_image", "truncated"))
        done = run("--json", "predict", "trash", pictures, "--csv", "out.csv", "--in-flight", 1, code=1)
        assert json.loads(done.stdout) == {"csv": "out.csv", "images": 5, "asked": 5, "failed": 1}
        assert rows_of(tmp_path / "out.csv")[0]["error"] == "bad_image: truncated (bad_image, HTTP 400)"
        before = len(rack.asked)
        done = run("--json", "predict", "trash", pictures, "--csv", "out.csv", "--resume")
        assert json.loads(done.stdout) == {"csv": "out.csv", "images": 5, "asked": 1, "failed": 0}
        assert len(rack.asked) == before + 1
        assert sorted(row["image"] for row in rows_of(tmp_path / "out.csv")) == sorted(self.names(pictures))

    def test_what_concerns_all_ends_the_run(self, run: Run, rack: Rack, pictures: Path, tmp_path: Path) -> None:
        rack.misbehave("/predict/trash", Told(200, *_answer()), problem(401, "unauthenticated"))
        done = run("predict", "trash", pictures, "--csv", "out.csv", "--in-flight", 1, code=1)
        assert "run the same command with --resume to continue" in done.stderr
        assert [row["image"] for row in rows_of(tmp_path / "out.csv")] == self.names(pictures)[:1]
        run("predict", "trash", pictures, "--csv", "out.csv", "--resume")
        assert [row["image"] for row in rows_of(tmp_path / "out.csv")] == self.names(pictures)

    @pytest.mark.parametrize("cut", [1, 20, 70, 90, 120])
    def test_a_row_that_was_half_written_is_written_anew(
        self, run: Run, pictures: Path, tmp_path: Path, cut: int
    ) -> None:
        """As a run leaves the file that was killed while it wrote: within the last row, or within the one before."""
        out = tmp_path / "out.csv"
        run("predict", "trash", pictures, "--csv", out)
        whole = out.read_bytes()
        out.write_bytes(whole[:-cut])
        run("predict", "trash", pictures, "--csv", out, "--resume")
        assert out.read_bytes() == whole

    def test_a_run_that_is_killed_goes_on(
        self, environment: dict[str, str], run: Run, rack: Rack, pictures: Path, tmp_path: Path
    ) -> None:
        rack.misbehave("/predict/trash", *[Told(200, *_answer())] * 2, Told(200, *_answer(), delay_s=60))
        out = tmp_path / "out.csv"
        command = [SCRIPT, "predict", "trash", pictures, "--csv", out, "--in-flight", "1"]
        running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        _until(lambda: len(rack.to("/predict/trash")) == 3)
        running.kill()
        running.wait(20)
        assert len(rows_of(out)) == 2
        rack.behave()
        run("predict", "trash", pictures, "--csv", out, "--resume")
        assert [row["image"] for row in rows_of(out)] == self.names(pictures)
        assert len(rack.to("/predict/trash")) == 3 + 3

    def test_what_is_there_is_not_overwritten_unasked(self, run: Run, pictures: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.csv"
        out.write_text("precious\n")
        assert "--resume continues it" in run("predict", "trash", pictures, "--csv", out, code=2).stderr
        assert "is of another run" in run("predict", "trash", pictures, "--csv", out, "--resume", code=2).stderr
        assert out.read_text() == "precious\n"
        run("predict", "trash", pictures, "--csv", out, "--force")
        assert "is of another run" in run("predict", "signs", pictures, "--csv", out, "--resume", code=2).stderr
        assert "expected --csv FILE" in run("predict", "trash", pictures, "--resume", code=2).stderr

    def test_a_bar_where_somebody_looks(self, environment: dict[str, str], pictures: Path, tmp_path: Path) -> None:
        command = [SCRIPT, "predict", "trash", pictures, "--csv", tmp_path / "out.csv"]
        code, text = _in_terminal(command, environment)
        assert (code, "5/5" in text) == (0, True)


def _answer() -> tuple[bytes, dict[str, str]]:
    best = {"label": "glass", "index": 0, "score": 0.5}
    good = told({"task": "trash", "version": VERSION, "predictions": [[best]]})
    return good.body, good.headers


def _until(holds: Callable[[], bool], deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def commands() -> dict[tuple[str, ...], Any]:
    """Every command, by its words."""

    def under(group: Any, words: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
        found: dict[tuple[str, ...], Any] = {}
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                found |= under(command, (*words, name))
            else:
                found[(*words, name)] = command
        return found

    return under(typer.main.get_command(app), ())


class TestEverywhere:
    @pytest.mark.parametrize("words", sorted(commands()), ids=" ".join)
    def test_every_command_speaks_json(self, words: tuple[str, ...]) -> None:
        assert any("--json" in getattr(one, "opts", ()) for one in commands()[words].params)

    def test_what_only_said_something_speaks_json_too(self, run: Run, image: Path) -> None:
        def told(*arguments: object) -> Any:
            return json.loads(run("--json", *arguments).stdout)

        assert told("tasks", "delete", "signs") == {"deleted": "signs"}
        assert told("datasets", "delete", "d1") == {"deleted": "d1"}
        saved = told("bundle", "download", "trash")
        assert told("bundle", "upload", "trash", saved["path"])["version"] == VERSION
        assert told("feedback", "trash", image, "--label", "glass")[0]["label"] == "glass"
        job = told("train", "trash", "--dataset", "d1")["id"]
        assert told("jobs", "watch", job)["state"] == "succeeded"
        assert told("jobs", "cancel", job)["id"] == job
        assert told("compare", "trash", "--dataset", "d1", "--detach")["method"] == "compare"

    @pytest.mark.parametrize(
        ("line", "offered"),
        [
            ("predict ", {"trash", "signs"}),
            ("versions tr", {"trash"}),
            ("datasets show ", {"d1"}),
            ("jobs show x", {*()}),
        ],
    )
    def test_the_shell_completes_names(self, script: Run, line: str, offered: set[str]) -> None:
        words = f"lensrack {line}"
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert set(script(_LENSRACK_COMPLETE="complete_bash", **asked).stdout.split()) == offered

    def test_a_server_that_is_away_completes_nothing(self, script: Run) -> None:
        asked = {"COMP_WORDS": "lensrack predict ", "COMP_CWORD": "2", "LENSRACK_URL": "http://127.0.0.1:1"}
        assert not script(_LENSRACK_COMPLETE="complete_bash", **asked).stdout.strip()

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_the_shell_gets_its_script(self, script: Run, shell: str) -> None:
        assert f"complete_{shell}" in script(_LENSRACK_COMPLETE=f"source_{shell}").stdout


class TestFailures:
    @pytest.mark.parametrize(
        ("answer", "code"),
        [
            (problem(404, "task_not_found"), 1),
            (problem(409, "conflict"), 1),
            (problem(422, "invalid_request"), 1),
            (problem(500, "internal"), 1),
            (problem(429, "queue_full", **{"Retry-After": "0"}), 3),
            (problem(503, "not_ready", **{"Retry-After": "0"}), 3),
            (problem(504, "deadline_exceeded", **{"Retry-After": "0"}), 3),
            (Told(200, b"{", drop=True), 3),
        ],
    )
    def test_exit_codes(self, run: Run, rack: Rack, image: Path, answer: Told, code: int) -> None:
        rack.misbehave("/predict/trash", *[answer] * 9)
        run("predict", "trash", image, code=code)

    def test_exit_codes_are_told(self, run: Run) -> None:
        told = " ".join(run("--help").stdout.split())
        assert "0 success; 1 failure; 2 the command is invalid, nothing was sent; 3 the server is unreachable" in told

    def test_an_error_is_one_line_with_the_next_step(self, run: Run, image: Path) -> None:
        done = run("predict", "nothing", image, code=1)
        assert done.stderr == ("error: task_not_found: no task 'nothing' - `lensrack tasks list` shows all tasks\n")

    def test_nobody_there(self, run: Run) -> None:
        done = run("--url", "http://127.0.0.1:1", "tasks", code=3)
        assert "is the server running? Start it with `make serve`" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (problem(401, "unauthorised", "unknown key"), "--api-key or LENSRACK_API_KEY"),
            (problem(500, "internal"), "request id request-1"),
            (Told(200, b"<html>"), "the answer is not a TaskList"),
            (problem(404, "x", "\x1b[2J"), "\N{REPLACEMENT CHARACTER}[2J"),
        ],
    )
    def test_others(self, run: Run, rack: Rack, answer: Told, expected: str) -> None:
        rack.misbehave("/tasks", answer)
        done = run("tasks", code=1)
        assert expected in done.stderr
        assert len(done.stderr.splitlines()) == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            ("no-such-command",),
            ("predict", "trash"),
            ("predict", "trash", "missing.jpg"),
            ("train", "trash"),
            ("--url", "localhost:8000", "tasks"),
            ("tasks", "show", ".."),
        ],
    )
    def test_wrong_commands(self, run: Run, rack: Rack, arguments: tuple[str, ...]) -> None:
        assert run(*arguments, code=2).stderr
        assert not rack.asked

    def test_the_key_and_the_url_come_from_options_or_the_environment(self, run: Run, rack: Rack, url: str) -> None:
        run("--url", url, "--api-key", "one", "tasks", LENSRACK_URL="http://127.0.0.1:1")
        run("tasks", LENSRACK_API_KEY="two")
        assert [asked.headers["authorization"] for asked in rack.asked] == ["Bearer one", "Bearer two"]

    def test_help_and_version(self, script: Run) -> None:
        assert "predict" in script("--help").stdout
        assert script("--version").stdout.strip()

    def test_the_console_script_itself(self, script: Run, image: Path) -> None:
        assert "glass" in script("predict", "trash", image).stdout
        assert "task_not_found" in script("predict", "nothing", image, code=1).stderr
        assert "is the server running" in script("tasks", code=3, LENSRACK_URL="http://127.0.0.1:1").stderr


def _in_terminal(command: list[object], environment: dict[str, str]) -> tuple[int, str]:
    """Run with a terminal for stderr; the exit code and what was drawn there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=theirs, env={**environment, "TERM": "xterm"}
    )
    os.close(theirs)
    drawn = bytearray()
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux tells the end of a terminal by EIO
            break
        if not chunk:
            break
        drawn += chunk
    os.close(ours)
    return process.wait(30), drawn.decode()
