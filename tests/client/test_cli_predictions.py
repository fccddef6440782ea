"""The command line against a rack on a real socket: predictions of pictures and of folders."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client.command_line import SCRIPT, Run, in_terminal
from tests.client.scripted_rack import VERSION, Rack, Told, problem, told
from tests.client.ways import PIXELS


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

    def test_standard_input(self, environment: dict[str, str], rack: Rack) -> None:
        for command in (["predict", "trash", "-", "--json"], ["feedback", "trash", "-", "--label", "glass"]):
            done = subprocess.run(
                [SCRIPT, *command], input=PIXELS, capture_output=True, env=environment, check=True, timeout=60
            )
            assert rack.asked[-1].body == PIXELS
            assert b'"image": "-"' in done.stdout or done.stderr == b"-: glass, before metal\n"
        done = subprocess.run(
            [SCRIPT, "predict", "trash", "-"], stdin=subprocess.DEVNULL, capture_output=True, env=environment,
            check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode, b"empty (0 bytes)" in done.stderr) == (2, True)


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
        (tmp_path / "pictures" / "BMW.txt").write_text("BM, as some texts and all BMP files begin")
        (tmp_path / "pictures" / ".hidden.jpg").write_bytes(PIXELS)
        (tmp_path / "pictures" / "loop").symlink_to(tmp_path / "pictures")
        return tmp_path / "pictures"

    def names(self, pictures: Path) -> list[str]:
        return [str(pictures / name) for name in ("a.jpg", "b/1.PNG", "b/2.webp", "c/last.jpeg", 'c/odd, "name".bmp')]

    LEFT_OUT = "left out: 2 not pictures (BMW.txt, notes.txt), 1 hidden (.hidden.jpg), 1 in a loop of links (loop)"

    def test_nothing_is_left_out_silently(self, run: Run, rack: Rack, pictures: Path, tmp_path: Path) -> None:
        """Other endings, no ending, links, and formats that no server reads: each has its row."""
        other = pictures / "d"
        other.mkdir()
        for name in ("edge.jfif", "old.jpe", "camera", "scan.TIF"):
            (other / name).write_bytes(PIXELS)
        (other / "phone").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
        (other / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
        (other / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(40))
        (other / "link.jpg").symlink_to(pictures / "a.jpg")
        (other / "gone").symlink_to(tmp_path / "nowhere")
        (other / "linked").symlink_to(pictures / "b")
        done = run("predict", "trash", pictures, "--csv", "out.csv", code=1)
        sent = "IMG_1.HEIC camera edge.jfif gone link.jpg linked/1.PNG linked/2.webp old.jpe phone scan.TIF"
        rows = rows_of(tmp_path / "out.csv")
        assert [row["image"] for row in rows] == [*self.names(pictures), *(str(other / name) for name in sent.split())]
        assert [Path(row["image"]).name for row in rows if row["error"]] == ["gone"]
        last = done.stderr.splitlines()[-1]
        assert last.startswith("out.csv: 14 of 15 images answered, 15 sent in this run; left out: 3 not pictures (")
        assert last.endswith("(BMW.txt, film.mp4, notes.txt), 1 hidden (.hidden.jpg), 1 in a loop of links (loop)")

    def test_every_picture_has_its_row(self, run: Run, pictures: Path, tmp_path: Path) -> None:
        run("predict", "trash", pictures, "--csv", "out.csv", "--top-k", 2)
        rows = rows_of(tmp_path / "out.csv")
        assert [row["image"] for row in rows] == self.names(pictures)
        first = {"task": "trash", "version": VERSION, "label": "glass", "score": "0.7", "error": ""}
        assert all(row.items() >= {**first, "label_2": "metal", "score_2": "0.35"}.items() for row in rows)

    def test_a_folder_to_the_terminal(self, run: Run, pictures: Path, tmp_path: Path) -> None:
        done = run("predict", "trash", pictures, "--json")
        assert [one["image"] for one in json.loads(done.stdout)] == self.names(pictures)
        assert done.stderr == f"{self.LEFT_OUT}\n"
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "notes.txt").touch()
        assert "got none; left out: 1 not pictures" in run("predict", "trash", tmp_path / "empty", code=2).stderr

    def test_an_image_without_an_answer_is_asked_again(
        self, run: Run, rack: Rack, pictures: Path, tmp_path: Path
    ) -> None:
        rack.misbehave("/predict/trash", problem(400, "bad_image", "truncated"))
        done = run("--json", "predict", "trash", pictures, "--csv", "out.csv", "--in-flight", 1, code=1)
        left_out = {"not_pictures": 2, "hidden": 1, "loops": 1}
        summary = {"csv": "out.csv", "images": 5, "left_out": left_out}
        assert json.loads(done.stdout) == {**summary, "asked": 5, "failed": 1}
        assert rows_of(tmp_path / "out.csv")[0]["error"] == "bad_image: truncated (bad_image, HTTP 400)"
        before = len(rack.asked)
        done = run("--json", "predict", "trash", pictures, "--csv", "out.csv", "--resume")
        assert json.loads(done.stdout) == {**summary, "asked": 1, "failed": 0}
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
        code, text = in_terminal(command, environment)
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
