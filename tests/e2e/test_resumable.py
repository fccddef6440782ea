"""A real server process that is killed in the middle of an upload, which goes on afterwards; and what it costs."""

from __future__ import annotations

import os
import random
import threading
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.conftest import free_port
from tests.e2e.forked_server import forked
from tests.e2e.server_process import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 2**20
QUIET = {"workers": "0", "threads": "1"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some pictures, and 40 MB that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "drawn")
    path = folder / "fruit.zip"
    with zipfile.ZipFile(path, "w") as out:
        for picture in sorted((folder / "drawn" / "fruit" / "train").rglob("*.*")):
            out.write(picture, picture.relative_to(folder / "drawn" / "fruit" / "train"))
        out.writestr("lemon/noise.png", random.Random(1).randbytes(40 * MIB))
    return path


def test_the_sdk_bears_a_server_that_is_killed_and_started_again(tmp_path: Path, archive: Path) -> None:
    """One call of the SDK; the server dies in its middle and another takes its place at the same address."""
    port = free_port()
    size, begun, killed = archive.stat().st_size, threading.Event(), threading.Event()
    seen: list[int] = []
    with forked(tmp_path, port=port, **QUIET) as server, Client(server.url, timeout=20) as client:

        def progress(sent: int, total: int | None) -> None:
            seen.append(sent)
            if sent > size // 2 and not begun.is_set():
                begun.set()
                assert killed.wait(30)

        answers: list[object] = []
        sending = threading.Thread(
            target=lambda: answers.append(client.datasets.upload(archive, name="fruit", progress=progress))
        )
        sending.start()
        assert begun.wait(60)
        server.kill()
        killed.set()
        with forked(tmp_path, port=port, **QUIET) as second, Client(second.url) as other:
            sending.join(120)
            assert not sending.is_alive()
            (stored,) = other.datasets.list()
            assert answers == [stored]
            assert [file.name for file in stored.skipped] == ["lemon/noise.png"]  # its checksum was right, though
        (cut,) = (at for at, (earlier, later) in enumerate(pairwise(seen), 1) if later < earlier)
        acknowledged = max(earlier for earlier, later in pairwise(seen[:cut]) if earlier == later)
        assert 0 < acknowledged <= seen[cut] < seen[cut - 1]
        assert seen[-1] == size


def test_an_upload_of_hundreds_of_megabytes_stays_out_of_the_server_s_memory(tmp_path: Path) -> None:
    size = 300 * MIB
    path = tmp_path / "large.zip"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)
    with serving(tmp_path / "home", **QUIET) as server, Client(server.url) as client:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        highest, done = [before], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                highest.append(process.memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        started = time.monotonic()
        try:
            with pytest.raises(Exception, match="bad_archive"):
                client.datasets.upload(path)
        finally:
            done.set()
            watching.join()
        grown = (max(highest) - before) / MIB
        print(f"{size / MIB:.0f} MiB in {time.monotonic() - started:.1f} s; the server grew by {grown:.0f} MiB")
        assert grown < 64
        assert os.listdir(tmp_path / "home" / "datasets" / "resumable") == []
