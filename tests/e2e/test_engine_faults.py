"""An engine that hangs or fails at everything: its clients are answered, and its process ends, to be started again: by
whoever started the server where it is all of it, by the server where there are front ends."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.e2e.forked_server import forked
from tests.e2e.server_process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
LONG_S = 60


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


@contextmanager
def faulty(home: Path, fault: str, **settings: str) -> Iterator[ServerProcess]:
    own = {"request_timeout_s": str(LONG_S), "drain_timeout_s": "3", "engine_timeout_s": "1"}
    with forked(home, fault=fault, **{**own, **settings}) as server:
        assert ask(server, "black").status_code == 200
        yield server


def ask(server: ServerProcess, colour: str) -> httpx.Response:
    headers = {"Content-Type": "image/png"}
    return httpx.post(f"{server.url}/embed", content=picture(colour), headers=headers, timeout=LONG_S)


class Asking(threading.Thread):
    """A client that waits for its answer while the test goes on."""

    def __init__(self, server: ServerProcess, colour: str) -> None:
        super().__init__()
        self.server, self.colour = server, colour
        self.start()

    def run(self) -> None:
        self.response = ask(self.server, self.colour)

    @property
    def answer(self) -> tuple[int, str, str | None]:
        self.join(LONG_S)
        return self.response.status_code, self.response.json()["code"], self.response.headers.get("Retry-After")


def becomes_unready(server: ServerProcess) -> str:
    deadline = time.monotonic() + LONG_S
    while (ready := httpx.get(f"{server.url}/readyz", timeout=LONG_S)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ready.json()["ready"] is False
    return str(ready.json()["checks"]["engine"])


def is_left(server: ServerProcess, fronts: str, status: int) -> None:
    if fronts == "0":
        assert server.process.wait(LONG_S) == status
        return
    deadline = time.monotonic() + LONG_S
    while not re.search(rf"engine \(pid \d+\) ended with {status}", server.log):
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    while ask(server, "black").status_code != 200:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


both = pytest.mark.parametrize("fronts", ["0", "1"])


def test_an_engine_that_hangs_is_left_and_its_clients_are_answered(tmp_path: Path) -> None:
    with faulty(tmp_path, "hang", fronts="0") as server:
        inside = Asking(server, "white")
        assert "more than 1 s" in becomes_unready(server)
        assert inside.answer == (503, "engine_unavailable", "5")
        refused = ask(server, "black")
        assert (refused.status_code, refused.json()["code"]) == (503, "engine_unavailable")
        assert server.process.wait(LONG_S) == 70
        assert "this process ends itself (70)" in server.log
        assert "in doomed" in server.log, "the log shows where the engine was"


@both
def test_an_engine_that_fails_at_everything_is_left(tmp_path: Path, fronts: str) -> None:
    with faulty(tmp_path, "fail", engine_timeout_s="100", fronts=fronts) as server:
        failed = ask(server, "white")
        assert (failed.status_code, failed.json()["code"]) == (500, "engine_failed")
        assert "CUDA" not in failed.text
        assert "fails at everything" in becomes_unready(server)
        is_left(server, fronts, 70)


@both
def test_a_process_that_hangs_as_a_whole_ends_with_its_stacks(tmp_path: Path, fronts: str) -> None:
    """The interpreter's lock is never let go of: no Python runs any more that could notice it."""
    with faulty(tmp_path, "hold", drain_timeout_s="1", fronts=fronts) as server:
        if fronts == "0":
            with pytest.raises(httpx.TransportError):
                ask(server, "white")
        else:
            refused = ask(server, "white")
            assert (refused.status_code, refused.json()["code"]) == (503, "engine_unavailable")
        is_left(server, fronts, 1)
        assert "Timeout (0:00:03)!" in server.log
        assert "in doomed" in server.log


@both
def test_a_server_whose_engine_hangs_can_be_stopped(tmp_path: Path, fronts: str) -> None:
    with faulty(tmp_path, "hang", drain_timeout_s="1", engine_timeout_s="0", fronts=fronts) as server:
        inside = Asking(server, "white")
        deadline = time.monotonic() + LONG_S
        while "lensrack_batch_rows_count 2.0" not in httpx.get(f"{server.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.stop() == 0
        inside.join(LONG_S)
