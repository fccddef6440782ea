"""The overload benchmark runs from the command line and accounts for every question; its generator counts truly."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest

from server.bench.load_generator import NO_ANSWER, Plan, generate
from tests.e2e.server_process import environment


@pytest.mark.slow
@pytest.mark.long
def test_every_question_is_accounted_for(tmp_path: Path) -> None:
    budget = ["--seconds", "1", "--capacity-seconds", "0.5", "--clients", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "overload", *budget, "--json", str(tmp_path / "overload.json")],
        env=environment(tmp_path / "unused", {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "overload.json").read_text())
    assert sum(report["by_status"].values()) == report["asked"] > 0
    assert report["retry_after"]["missing"] == 0
    assert report["rss_mib"]["peak"] >= report["rss_mib"]["before"] > 0
    assert all(rate > 0 for rate in report["capacity"].values())
    assert "| goodput (answers/s) |" in done.stdout


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Plan]:
    """Answers 200, then 429 with Retry-After, then 200 and hangs up, then hangs up without an answer; and again."""
    turn = count()

    class Script(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.rfile.read(int(self.headers["Content-Length"])) == b"picture"
            number = next(turn) % 4
            self.close_connection = number >= 2
            if number == 3:
                return
            self.send_response(429 if number == 1 else 200)
            if number == 1:
                self.send_header("Retry-After", "7")
            if number == 2:
                self.send_header("Connection", "close")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    picture = tmp_path / "picture"
    picture.write_bytes(b"picture")
    with ThreadingHTTPServer(("127.0.0.1", 0), Script) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield Plan("127.0.0.1", server.server_port, "/predict/x", str(picture), "image/png")
        server.shutdown()
        serving.join()


@pytest.mark.parametrize("rate", [0.0, 200.0])
def test_the_generator_counts_every_way_to_be_answered(scripted: Plan, rate: float) -> None:
    seen = generate(replace(scripted, requests=40, rate=rate))
    assert Counter(answer.status for answer in seen.answers) == {200: 20, 429: 10, NO_ANSWER: 10}
    assert {answer.retry_after for answer in seen.answers if answer.status == 429} == {"7"}
    assert all(answer.due_s <= answer.sent_s <= answer.done_s for answer in seen.answers)
    assert seen.connections >= 20, "one that was hung up was used again"
