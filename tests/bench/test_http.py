"""The HTTP benchmark asks as it says and tells what it has measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from server.bench import http, http_figures, http_report, synthetic_tasks
from server.bench.http_targets import Copies
from server.bench.load_generator import Answer, LoadResult, Plan, generate
from server.bench.process_tree import Memory
from server.settings import Settings
from tests.e2e.server_process import environment

TASKS = synthetic_tasks.names(3)


@pytest.mark.slow
@pytest.mark.long
def test_from_the_command_line_with_files(tmp_path: Path) -> None:
    small = ["--tasks", "2", "--rounds", "1", "--requests", "10", "--clients", "2", "--seconds", "1"]
    files = ["--json", str(tmp_path / "http.json"), "--picture", str(tmp_path / "http.svg")]
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "http", *small, *files],
        env=environment(tmp_path / "unused", {}),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "http.json").read_text())
    assert set(report["closed"]) == set(http.POPULARITIES)
    for figures in (*report["closed"].values(), *report["open"].values()):
        assert {"lensrack, float32", "FastAPI, a forward each"} <= set(figures)
        assert all(0 < own["answered"] == own["asked"] and own["cpu_ms"] > 0 for own in figures.values())
    assert report["copies"]["copies"] == 2
    assert "lensrack, float32" in (tmp_path / "http.svg").read_text()


@pytest.fixture
def requested(tmp_path: Path) -> Iterator[tuple[Plan, Counter[str]]]:
    """A server that counts what it is asked, and a plan for it."""
    counts: Counter[str] = Counter()

    class Counting(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            counts[f"{self.path} {body}"] += 1
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    for task in TASKS:
        (tmp_path / f"{task}.jpg").write_text(task)
    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        picture = str(tmp_path / "{task}.jpg")
        yield Plan("127.0.0.1", server.server_port, "/predict/{task}", picture, "image/jpeg", tasks=TASKS), counts
        server.shutdown()
        serving.join()


@pytest.mark.parametrize("rate", [0.0, 400.0])
def test_tasks_are_asked_by_their_shares(requested: tuple[Plan, Counter[str]], rate: float) -> None:
    plan, counts = requested
    shares = tuple(http.shares("zipf", len(TASKS)))
    seen = generate(Plan(**{**vars(plan), "requests": 300, "clients": 16, "rate": rate, "shares": shares}))
    assert {answer.status for answer in seen.answers} == {200}
    output = Counter(TASKS[answer.task] for answer in seen.answers)
    assert counts == {f"/predict/{task} {task}": output[task] for task in TASKS}
    assert output[TASKS[0]] > output[TASKS[1]] > output[TASKS[2]] > 0


@pytest.mark.parametrize(
    ("popularity", "expected"), [("identical", [1, 0, 0]), ("uniform", [1, 1, 1]), ("zipf", [1, 1 / 2, 1 / 3])]
)
def test_popularities(popularity: str, expected: list[float]) -> None:
    assert http.shares(popularity, 3) == expected


def test_made_up_tasks_are_served_by_the_backbone_they_are_made_for(tmp_path: Path) -> None:
    from server.methods.registry import Registry

    spec = synthetic_tasks.spec_of(Settings(backbone="untrained", backbone_weights=None))
    for method in ("linear", "vpt_deep"):
        bundle = synthetic_tasks.bundle(spec, TASKS[0], method, 3, 0)
        Registry().check(bundle, spec)
        assert bundle.version != synthetic_tasks.bundle(spec, TASKS[0], method, 3, 1).version


def turns(*cpu: float, latency: float) -> http_figures.Measurements:
    figures = http_figures.Measurements()
    for ms in cpu:
        answers = [Answer(0.0, 0.0, latency / 1e3, 200, None)] * 4 + [Answer(0.0, 0.0, 9.0, 429, "1")]
        figures.add(LoadResult(answers, 0.0, 1), 4 * ms / 1e3)
    return figures


def test_ratios_are_medians_of_rounds_against_the_peer() -> None:
    figures = {"uniform": {"lensrack": turns(1, 9, 3, latency=10), "LitServe, by task": turns(2, 3, 6, latency=400),
                         "LitServe, a copy a task": turns(4, 6, 12, latency=400)}}  # fmt: skip
    options = argparse.Namespace(objective=250.0)
    report = http_report.report(figures, {"4": figures["uniform"]}, {"lensrack": Memory(5, 4)}, None, options)
    ours, peer, copied = report["closed"]["uniform"].values()
    assert (ours["cpu_ms"], ours["ratio"], peer["ratio"], copied["ratio"]) == (3, 0.5, 1, 2)
    assert (ours["within_objective"], peer["within_objective"]) == (0.8, 0)
    assert (ours["asked"], ours["answered"], ours["p95_ms"]) == (15, 12, 10)
    output = http_report.tables({**report, "options": {"tasks": 2, "objective": 250}})
    assert "| lensrack | 3.0 | 0.5 |" in output
    assert "| LitServe, by task | 400.0 | 400.0 | 400.0 | 0.0% | 12 of 15 |" in output


COPIES = Copies(8, first=Memory(200, 100), every=Memory(1000, 800))


def test_memory_is_held_against_a_server_and_a_process_with_copies() -> None:
    memory = {
        "lensrack, float32": Memory(300, 250),
        "LitServe, by task": Memory(500, 300),
        "LitServe, a copy a task": Memory(1200, 1000),
    }
    output = memory_table(memory, COPIES)
    shares = "of a server with 8 copies | of 8 copies, no server"
    assert output[0] == f"| | MiB | {shares} | own MiB | {shares} |"
    assert "| lensrack, float32 | 300 | 0.25 | 0.30 | 250 | 0.25 | 0.31 |" in output
    assert "| LitServe, a copy a task | 1,200 | 1.00 | 1.20 | 1,000 | 1.00 | 1.25 |" in output
    assert "| one copy of the model, no server | 200 | 0.17 | 0.20 | 100 | 0.10 | 0.12 |" in output
    assert "| 8 copies of the model, no server | 1,000 | 0.83 | 1.00 | 800 | 0.80 | 1.00 |" in output


def test_memory_without_copies_has_no_shares() -> None:
    memory = {"lensrack, float32": Memory(300, 250), "FastAPI, a forward each": Memory(250, 200)}
    rows = ["| | MiB | own MiB |", "|---|---|---|", "| lensrack, float32 | 300 | 250 |"]
    assert memory_table(memory, None)[:3] == rows
    [head, *_] = memory_table(memory, COPIES)  # and without a peer
    assert head == "| | MiB | of 8 copies, no server | own MiB | of 8 copies, no server |"


def memory_table(memory: dict[str, Memory], copies: Copies | None) -> list[str]:
    options = argparse.Namespace(tasks=8, objective=250.0)
    figures = {"uniform": {name: turns(1.0, latency=10) for name in memory}}
    report = http_report.report(figures, {}, memory, copies, options)
    return http_report.tables({**report, "options": vars(options)}).split("\n\n")[-1].splitlines()
