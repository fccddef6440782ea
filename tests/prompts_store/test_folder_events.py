"""What the kernel tells of a folder's folders: of everything at first, then of what was touched, at once."""

from __future__ import annotations

import errno
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import inotify_simple
import pytest

from prompts_store import folder_events
from prompts_store.folder_events import Names

SOON_S = 5.0
NEVER_S = 3600.0
WAYS = {"inotify": folder_events._by_inotify, "watchfiles": folder_events._by_watchfiles}
Way = Callable[[Path, threading.Event, float], Iterator[Names]]


@contextmanager
def told(way: Way, root: Path, every_s: float = NEVER_S) -> Iterator[queue.Queue[Names]]:
    """What a watcher of `root` is told, from when it listens."""
    heard: queue.Queue[Names] = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [heard.put(names) for names in way(root, stop, every_s)])
    thread.start()
    try:
        assert heard.get(timeout=SOON_S) is None
        yield heard
    finally:
        stop.set()
        thread.join(SOON_S)
        assert not thread.is_alive()


def listening(heard: queue.Queue[Names], root: Path) -> None:
    """watchfiles begins to listen some time after it has said that it knows nothing."""
    for attempt in range(50):
        (root / f"probe{attempt}").write_text("")
        try:
            heard.get(timeout=0.1)
        except queue.Empty:
            continue
        break
    while True:
        try:
            heard.get(timeout=0.3)
        except queue.Empty:
            return


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]


def test_it_says_where(way: Way, tmp_path: Path) -> None:
    (tmp_path / "cats" / "versions").mkdir(parents=True)
    with told(way, tmp_path) as heard:
        listening(heard, tmp_path)
        for change in (
            lambda: (tmp_path / "cats" / "aliases.json").write_text("{}"),
            lambda: (tmp_path / "cats" / "versions" / "one").write_text(""),
            lambda: os.replace(tmp_path / "cats" / "versions" / "one", tmp_path / "cats" / "versions" / "two"),
            (tmp_path / "cats" / "versions" / "two").unlink,
            lambda: shutil.rmtree(tmp_path / "cats"),
        ):
            change()
            assert heard.get(timeout=SOON_S) == {"cats"}
            while not heard.empty():
                assert heard.get() == {"cats"}
        (tmp_path / "dogs").mkdir()
        while heard.get(timeout=SOON_S) != {"dogs"}:  # what is left of the cats
            pass


def test_folders_that_come_later_are_watched_with_what_is_in_them(way: Way, tmp_path: Path) -> None:
    root, aside = tmp_path / "root", tmp_path / "aside"
    root.mkdir()
    (aside / "versions").mkdir(parents=True)
    with told(way, root) as heard:
        listening(heard, root)
        os.replace(aside, root / "fish")
        assert heard.get(timeout=SOON_S) == {"fish"}
        for name in ("one", "two"):
            (root / "fish" / "versions" / name).write_text("")
            assert heard.get(timeout=SOON_S) == {"fish"}


def test_names_with_a_dot_do_not_count(way: Way, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with told(way, tmp_path) as heard:
        listening(heard, tmp_path)
        (tmp_path / "cats" / ".new-1").write_text("half")
        with pytest.raises(queue.Empty):
            heard.get(timeout=0.3)
        os.replace(tmp_path / "cats" / ".new-1", tmp_path / "cats" / "aliases.json")
        assert heard.get(timeout=SOON_S) == {"cats"}


def test_now_and_then_everything_is_to_be_looked_at(way: Way, tmp_path: Path) -> None:
    with told(way, tmp_path, every_s=0.3) as heard:
        assert [heard.get(timeout=SOON_S) for _ in range(2)] == [None, None]


def test_nobody_knows_what_was_in_a_queue_that_overflowed(tmp_path: Path) -> None:
    """The kernel's own queue, filled while nobody reads it."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (tmp_path / "a").write_text("")
    stop = threading.Event()
    too_late = threading.Timer(2 * SOON_S, stop.set)
    too_late.start()
    changes = folder_events._by_inotify(tmp_path, stop, NEVER_S)
    assert next(changes) is None
    for _ in range(most // 4 + 1):  # each rename is two events
        os.replace(tmp_path / "a", tmp_path / "b")
        os.replace(tmp_path / "b", tmp_path / "a")
    (tmp_path / "late").mkdir()
    assert next(changes) is None
    (tmp_path / "late" / "one").write_text("")
    assert next(changes, "nothing") == {"late"}
    too_late.cancel()
    changes.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lacking", ["INotify", "add_watch"])
def test_without_watches_changes_are_found_by_looking(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inotify_simple if lacking == "INotify" else inotify_simple.INotify, lacking, refuse)
    (tmp_path / "cats").mkdir()
    with caplog.at_level(logging.WARNING), told(WAYS["inotify"], tmp_path, every_s=0.2) as heard:
        assert heard.get(timeout=SOON_S) is None
    [said] = caplog.records
    assert "max_user_watches" in said.getMessage()


def test_watches_are_given_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    changes = folder_events._by_inotify(tmp_path, threading.Event(), NEVER_S)
    next(changes)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    changes.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before
