"""The command line against a rack on a real socket: reading, changing, data sets, and what all commands share."""

from __future__ import annotations

import io
import json
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer

from lensrack.cli import app
from tests.client.command_line import SCRIPT, Run
from tests.client.scripted_rack import VERSION, Rack, Told, problem, told


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
            (("datasets",), "d1"),
            (("datasets", "show", "d1"), "train/glass"),
        ],
    )
    def test_views(self, run: Run, arguments: tuple[str, ...], expected: str) -> None:
        assert expected in run(*arguments).stdout

    def test_versions_in_words(self, run: Run, rack: Rack) -> None:
        """The newest first, by when they were made, whatever the server's order; and which of them answer."""
        plain = rack._version()
        older = {
            **plain,
            "version": "b" * 64,
            "method": "linear",
            "created_at": 0.5,
            "metrics": {},
            "dataset": "d" * 64,
        }
        newer = {**plain, "version": "c" * 64, "created_at": 2.0, "metrics": {"val_accuracy": 0.875, "epochs": 3}}
        aliases = [
            {"name": name, "targets": [{"version": version, "weight": weight} for version, weight in targets],
             "revision": 1, "changed_at": 1.0}
            for name, targets in (("live", [(VERSION, 0.9), ("c" * 64, 0.1)]), ("best", [(VERSION, 1.0)]))
        ]  # fmt: skip
        rack.misbehave("/tasks/trash/versions", told({"versions": [older, newer, plain]}))
        rack.misbehave("/tasks/trash", told({**rack._task("trash"), "aliases": aliases}))
        heading, *rows = run("versions", "trash").stdout.splitlines()
        assert re.split(" {2,}", heading) == [
            *("version", "alias", "made", "method"),
            *("validation accuracy", "labels", "dataset", "size"),
        ]
        told_rows = [[cell for at, cell in enumerate(re.split(" {2,}", row)) if at != 2] for row in rows]
        assert told_rows == [
            ["c" * 12, "live 10%", "vpt_deep", "87.5%", "3", "-", "8 B"],
            [VERSION[:12], "live 90%, best", "vpt_deep", "90.0%", "3", "-", "8 B"],
            ["b" * 12, "-", "linear", "-", "3", "d" * 12, "8 B"],
        ]

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
        rack.misbehave("/tasks/trash/aliases/live", told({**rack._alias("live"), "targets": [{"version": "b" * 64}]}))
        moved = f"live of trash: from {'b' * 12} back to {VERSION[:12]}"
        assert run("rollback", "trash").stderr == f"{moved}\n"
        assert "precondition_failed" in run("alias", "trash", "live", VERSION, "--if-match", '"1"', code=1).stderr

    def test_deleting(self, run: Run, rack: Rack) -> None:
        refused = run("tasks", "delete", "signs", code=2).stderr
        assert "delete task signs with its 1 versions, aliases and feedback? " in refused
        assert "--yes does it without asking" in refused
        assert rack.tasks == {"trash", "signs"}
        assert "task_not_found" in run("tasks", "delete", "other", code=1).stderr
        run("tasks", "delete", "signs", "--yes")
        assert rack.tasks == {"trash"}
        assert "deleted" in run("datasets", "delete", "d1").stderr

    def test_bundles(self, run: Run, rack: Rack, tmp_path: Path) -> None:
        name = run("bundle", "download", "trash").stdout.strip()
        assert name == f"trash-{VERSION[:12]}.safetensors"
        assert (tmp_path / name).read_bytes() == b"a bundle"
        assert run("bundle", "upload", "trash", name, "--alias", "live").stdout.strip() == VERSION
        assert "File exists" in run("bundle", "download", "trash", code=1).stderr
        run("bundle", "download", "trash", VERSION, "--force")

    def test_exports(self, run: Run, rack: Rack, tmp_path: Path) -> None:
        for ref, form, name in (
            ("trash", "onnx", f"trash-{VERSION[:12]}.onnx"),
            ("trash@live", "timm", f"trash-{VERSION[:12]}-timm.safetensors"),
            (f"trash@{VERSION[:8]}", "bundle", f"trash-{VERSION[:8]}.safetensors"),
        ):
            assert run("export", ref, "--format", form, "--input", "float").stdout == f"{name}\n"
            assert (tmp_path / name).read_bytes() == b"a bundle"
            assert rack.asked[-1].path.endswith("/export")
            assert rack.asked[-1].params == {"format": form, "input": "float"}
        assert "--force replaces it" in run("export", "trash", code=2).stderr
        assert json.loads(run("export", "trash", "--force", "--json").stdout)["version"] == VERSION
        assert "expected --format onnx, timm, bundle" in run("export", "trash", "--format", "tflite", code=2).stderr
        rack.misbehave("/tasks/trash", told({**rack._task("trash"), "live": None}))
        assert "has no live version" in run("export", "trash", code=2).stderr


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

    def test_a_folder(self, run: Run, rack: Rack, folder: Path) -> None:
        for name in ("1.jfif", ".hidden.jpg", "notes.txt"):
            (folder / "glass" / name).write_bytes(b"text" if name == "notes.txt" else b"\xff\xd8\xff")
        (folder / "glass" / "2.jpg").touch()
        rack.misbehave("/tasks/trash/feedback", problem(400, "bad_image", "truncated"))
        said = run("feedback", "trash", folder, "--label", "glass", code=1).stderr.splitlines()
        assert [line.partition("glass/")[2] for line in said[:-1]] == [
            "0.jpg: bad_image: truncated - check that the file opens in an image viewer",
            "1.jfif: glass, before metal",
            f"2.jpg: the image {folder / 'glass' / '2.jpg'} is empty (0 bytes)",
        ]
        assert said[-1] == "left out: 1 not pictures (notes.txt), 1 hidden (.hidden.jpg)"
        rack.misbehave("/tasks/trash/feedback", problem(422, "unknown_label", "no label 'tin'"))
        before = len(rack.asked)
        assert "add --new-label" in run("feedback", "trash", folder, "--label", "tin", code=1).stderr
        assert len(rack.asked) == before + 1, "what is wrong with the label is told once"

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

        assert told("tasks", "delete", "signs", "--yes") == {"deleted": "signs"}
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

    def test_nearest_names(self, run: Run, rack: Rack, image: Path) -> None:
        said = run("predict", "trahs@live", image, code=1).stderr
        assert (
            said
            == "error: task_not_found: no task 'trahs' - did you mean trash?; `lensrack tasks list` shows all tasks\n"
        )
        said = run("tasks", LENSRACK_APIKEY="k", LENSRACK_BACKBONE="mine", LENSRACK_KEYS="a").stderr
        assert said == "warning: LENSRACK_APIKEY has no effect: did you mean LENSRACK_API_KEY?\n"

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
