"""What a killed server leaves in the folder for temporary files, and that a later server removes it."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from pathlib import Path

import pytest

from server.processes.runtime_dir import LOCK, create, sweep


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_owner() -> None:
    """Start a process that creates a folder, and kill it there."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with create() as folder:
            (folder / "engine").write_text("a socket")
            os.write(writing, b".")
            signal.pause()
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_it_is_its_owners_alone_and_goes_with_it(temporary: Path) -> None:
    with create() as folder:
        assert folder.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
        sweep(temporary)
        assert (folder / LOCK).exists(), "its owner runs"
    assert list(temporary.iterdir()) == []


def test_what_a_killed_owner_left_is_swept_by_the_next(temporary: Path) -> None:
    killed_owner()
    [left] = temporary.iterdir()
    with create() as folder:
        assert [*temporary.iterdir()] == [folder]
        assert folder != left


def test_a_folder_is_kept_while_a_process_that_its_owner_forked_lives(temporary: Path) -> None:
    """It may still be talking over the socket in it."""
    reading, writing = os.pipe()
    owner = os.fork()
    if not owner:
        with create():
            forked = os.fork()
            if forked:
                os.write(writing, forked.to_bytes(4, "big"))
            signal.pause()
    forked = int.from_bytes(os.read(reading, 4), "big")
    for descriptor in (reading, writing):
        os.close(descriptor)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    [folder] = temporary.iterdir()
    sweep(temporary)
    assert folder.exists()
    lock = os.open(folder / LOCK, os.O_RDONLY)
    os.kill(forked, signal.SIGKILL)
    fcntl.flock(lock, fcntl.LOCK_EX)  # when that process has ended, too
    os.close(lock)
    sweep(temporary)
    assert not folder.exists()


def test_what_is_no_servers_stays(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    elsewhere.chmod(0o700)
    (elsewhere / LOCK).touch()
    (temporary / "lensrack-link").symlink_to(elsewhere)
    (temporary / "lensrack-file").touch()
    beginning, open_to_all, linked = (temporary / f"lensrack-{name}" for name in ("beginning", "open", "linked"))
    for folder in (beginning, open_to_all, linked):
        folder.mkdir(0o700)
    (open_to_all / LOCK).touch()
    open_to_all.chmod(0o777)
    (linked / LOCK).symlink_to(elsewhere / LOCK)
    before = sorted(temporary.iterdir())
    sweep(temporary)
    assert sorted(temporary.iterdir()) == before
    assert (elsewhere / LOCK).exists()


def test_links_in_a_folder_that_is_swept_are_not_followed(
    temporary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("kept")
    (elsewhere / "precious").touch()
    killed_owner()
    [left] = temporary.iterdir()
    (left / "away").symlink_to(elsewhere)
    sweep(temporary)
    assert list(temporary.iterdir()) == []
    assert (elsewhere / "precious").exists()
