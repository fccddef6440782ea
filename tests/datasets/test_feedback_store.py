"""Feedback on a real disk: several processes write at once, die while they do, and what was acknowledged stays."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.datasets.feedback_store import FeedbackStore
from server.datasets.formats import feedback_log
from server.datasets.formats.feedback_log import FeedbackEntry, FeedbackLogFile
from server.errors import BadRequest, Conflict, DiskFull, NotFound, ServiceError, Unavailable
from tests.datasets.test_dataset_store import REPOSITORY, picture


def opened(root: Path, **options: Any) -> FeedbackStore:
    return FeedbackStore(root, **{"max_images": 1000, "max_image_pixels": 10**6, **options})


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    return opened(tmp_path / "feedback")


def labels(store: FeedbackStore, task: str = "pets") -> dict[str, str]:
    return {word.sha256: word.label for word in store.page(task, limit=1000).entries}


def test_the_last_word_counts_and_the_same_word_changes_nothing(store: FeedbackStore, tmp_path: Path) -> None:
    [first] = store.add("pets", [picture(1)], "cat")
    assert (first.previous, first.entry.label, first.entry.width, first.entry.height) == (None, "cat", 24, 16)
    [again] = store.add("pets", [picture(1)], "cat")
    assert (again.previous, again.entry) == ("cat", first.entry)
    [changed] = store.add("pets", [picture(1)], "dog")
    assert (changed.previous, changed.entry.seq) == ("cat", 2)
    store.add("pets", [picture(2), picture(3)], "cat")
    for seen in (store, opened(tmp_path / "feedback")):
        page = seen.page("pets")
        assert (page.counts, [word.seq for word in page.entries], page.next) == ({"cat": 2, "dog": 1}, [4, 3, 2], None)
    assert {path.read_bytes() for _, path in store.examples("pets")} == {picture(1), picture(2), picture(3)}
    assert [example.label for example, _ in store.examples("pets")] == ["dog", "cat", "cat"]
    assert store.page("birds").counts == {}


def test_pages(store: FeedbackStore) -> None:
    for number in range(7):
        store.add("pets", [picture(number)], "cat" if number % 2 else "dog")
    first = store.page("pets", limit=3)
    second = store.page("pets", limit=3, before=first.next)
    third = store.page("pets", limit=3, before=second.next)
    assert [[word.seq for word in page.entries] for page in (first, second, third)] == [[7, 6, 5], [4, 3, 2], [1]]
    assert third.next is None
    assert [word.seq for word in store.page("pets", label="cat").entries] == [6, 4, 2]


def test_withdrawing(store: FeedbackStore, tmp_path: Path) -> None:
    [one], _ = store.add("pets", [picture(1)], "cat"), store.add("birds", [picture(1)], "owl")
    store.delete("pets", one.entry.sha256)
    assert (labels(store), labels(opened(tmp_path / "feedback"))) == ({}, {})
    for gone in (one.entry.sha256, "../../lock", ""):
        with pytest.raises(NotFound):
            store.delete("pets", gone)
    assert [each.previous for each in store.add("pets", [picture(1)], "dog")] == [None]
    store.delete_task("pets")
    store.delete_task("pets")
    assert (labels(store), labels(store, "birds")) == ({}, {one.entry.sha256: "owl"})
    assert sorted(path.name for path in (tmp_path / "feedback").iterdir()) == ["birds", "lock"]


def test_what_is_no_picture_is_refused_before_any_is_stored(store: FeedbackStore) -> None:
    with pytest.raises(ServiceError, match="image 1: "):
        store.add("pets", [picture(1), b"no picture"], "cat")
    with pytest.raises(ServiceError) as caught:
        store.add("pets", [picture(1)[:-30]], "cat")
    assert isinstance(caught.value, BadRequest)
    assert labels(store) == {}


def test_it_grows_up_to_a_bound(tmp_path: Path) -> None:
    store = opened(tmp_path, max_images=2)
    store.add("pets", [picture(1), picture(2)], "cat")
    with pytest.raises(Conflict, match="2 images of feedback") as caught:
        store.add("pets", [picture(3)], "cat")
    assert caught.value.code == "feedback_full"
    assert [one.previous for one in store.add("pets", [picture(1)], "dog")] == ["cat"]


SAY = """
import sys
from pathlib import Path
from server.datasets.feedback_store import FeedbackStore
from tests.datasets.test_dataset_store import picture
store = FeedbackStore(Path(sys.argv[1]), max_images=1000, max_image_pixels=10**6)
for number in range(60):
    store.add("pets", [picture(number, (int(sys.argv[3]), 16))], sys.argv[2])
    print(number, flush=True)
"""


def start(root: Path, label: str, width: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAY, str(root), label, str(width)]
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "client")))
    return subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )


def test_processes_at_once_and_one_that_is_killed_lose_no_word(tmp_path: Path) -> None:
    root = tmp_path / "feedback"
    speaking = {label: start(root, label, width) for label, width in (("cat", 24), ("dog", 25), ("owl", 26))}
    killed = speaking.pop("owl")
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) == 19:
            killed.kill()
            break
    acknowledged = 20 + len(killed.communicate()[0].split())
    for process in speaking.values():
        assert len(process.communicate(timeout=60)[0].split()) == 60
    store = opened(root)
    counts = store.page("pets").counts
    assert {label: counts[label] for label in ("cat", "dog")} == {"cat": 60, "dog": 60}
    assert acknowledged <= counts["owl"] <= acknowledged + 1
    assert sorted(e.seq for e in store.page("pets", limit=1000).entries) == list(range(1, sum(counts.values()) + 1))
    for example, path in store.examples("pets"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name == example.sha256
    assert len(list((root / "pets" / "pictures").iterdir())) == sum(counts.values())


def test_half_a_line_is_no_word_and_hurts_none(store: FeedbackStore, tmp_path: Path) -> None:
    store.add("pets", [picture(1)], "cat")
    path = tmp_path / "feedback" / "pets" / "words"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[:40])
    assert len(labels(store)) == 1
    store.add("pets", [picture(2)], "dog")
    assert path.read_bytes().startswith(whole + b'{"seq": 2')
    assert len(labels(opened(tmp_path / "feedback"))) == 2


def test_a_damaged_file_is_told_and_its_pictures_are_kept(store: FeedbackStore, tmp_path: Path) -> None:
    store.add("pets", [picture(1)], "cat")
    store.add("birds", [picture(1)], "owl")
    (tmp_path / "feedback" / "pets" / "words").write_text("{}\n[\n")
    again = opened(tmp_path / "feedback")
    with pytest.raises(Unavailable, match="damaged"):
        again.page("pets")
    assert len(list((tmp_path / "feedback" / "pets" / "pictures").iterdir())) == 1
    assert len(labels(again, "birds")) == 1


def test_a_start_sweeps_what_the_dead_left(store: FeedbackStore, tmp_path: Path) -> None:
    root = tmp_path / "feedback"
    [one] = store.add("pets", [picture(1)], "cat")
    (root / "pets" / "pictures" / "half.new").write_bytes(b"half")
    (root / "pets" / "pictures" / ("0" * 64)).write_bytes(b"nobody said a word")
    (root / ".gone-1" / "pictures").mkdir(parents=True)
    opened(root)
    assert [path.name for path in (root / "pets" / "pictures").iterdir()] == [one.entry.sha256]
    assert not (root / ".gone-1").exists()


def test_a_full_disk_says_no_half_word(store: FeedbackStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("pets", [picture(1)], "cat")
    path = tmp_path / "feedback" / "pets" / "words"
    before = path.read_bytes()
    real = os.fsync

    def full(file: int) -> None:
        if os.fstat(file).st_ino == path.stat().st_ino:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        store.add("pets", [picture(1)], "dog")
    assert path.read_bytes() == before
    assert set(labels(store).values()) == {"cat"}


def test_a_file_of_words_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_log, "MIN_LINES", 10)
    file, other = FeedbackLogFile(tmp_path / "words"), FeedbackLogFile(tmp_path / "words")
    for number in range(50):
        file.append(FeedbackEntry(number + 1, "ab"[number % 2] * 64, f"label {number}"))
        assert other.read() == file.read() == FeedbackLogFile(tmp_path / "words").read()
    assert {word.label for word in file.read().last.values()} == {"label 48", "label 49"}
    assert (tmp_path / "words").read_bytes().count(b"\n") <= 12
    assert file.read().next_seq == 51
