"""The HTTP benchmark asks as it says, its peers answer what the engine answers, and it tells what it has measured."""

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

import numpy as np
import psutil
import pytest
import torch

from prompts_store import open_store
from server.bench import http, http_report, made_tasks, peers
from server.bench.load_generator import Answer, Plan, Seen, generate
from server.bench.process_tree import cpu_s, memory_mib
from server.engine import backbone as engine_backbone
from server.engine import reference
from server.settings import Settings
from tests.e2e.server_process import environment

TASKS = made_tasks.names(3)


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
    for found in (*report["closed"].values(), *report["open"].values()):
        assert {"lensrack, float32", "FastAPI, a forward each"} <= set(found)
        assert all(0 < own["answered"] == own["asked"] and own["cpu_ms"] > 0 for own in found.values())
    assert report["copies"]["copies"] == 2
    assert "lensrack, float32" in (tmp_path / "http.svg").read_text()


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[tuple[Plan, Counter[str]]]:
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
def test_tasks_are_asked_by_their_shares(asked: tuple[Plan, Counter[str]], rate: float) -> None:
    plan, counts = asked
    shares = tuple(http.shares("zipf", len(TASKS)))
    seen = generate(Plan(**{**vars(plan), "requests": 300, "clients": 16, "rate": rate, "shares": shares}))
    assert {one.status for one in seen.answers} == {200}
    told = Counter(TASKS[one.task] for one in seen.answers)
    assert counts == {f"/predict/{task} {task}": told[task] for task in TASKS}
    assert told[TASKS[0]] > told[TASKS[1]] > told[TASKS[2]] > 0


@pytest.mark.parametrize(
    ("popularity", "expected"), [("identical", [1, 0, 0]), ("uniform", [1, 1, 1]), ("zipf", [1, 1 / 2, 1 / 3])]
)
def test_popularities(popularity: str, expected: list[float]) -> None:
    assert http.shares(popularity, 3) == expected


def test_peers_answer_what_the_reference_answers(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path / 'store'}")
    eye = engine_backbone.load("untrained", device="cpu")
    bundles = [store.get(task, version) for task, version in
               zip(TASKS, made_tasks.publish(store, eye.spec, TASKS, "vpt_deep", 2), strict=True)]  # fmt: skip
    store.close()
    threads = torch.get_num_threads()
    try:
        arguments = ["fastapi", "--store", f"file://{tmp_path / 'store'}", "--backbone", "untrained"]
        model = peers.Model(peers.options([*arguments, "--threads", str(threads)]))
    finally:
        torch.set_num_threads(threads)
    [picture, other] = [model.decode(file.read_bytes()) for file in made_tasks.pictures(None, tmp_path, 2, side=100)]
    batch = [(TASKS[2], picture), (TASKS[0], other), (TASKS[2], other)]
    for (task, pixels), answer in zip(batch, peers.by_task(batch, model), strict=True):
        bundle = bundles[TASKS.index(task)]
        params = {name: torch.tensor(value) for name, value in bundle.tensors.items()}
        logits = reference.vpt_deep(eye, pixels[None], params, bundle.manifest.prompt_lengths)[0]
        assert answer[0]["index"] == int(logits.argmax())
        scores = {one["label"]: one["score"] for one in answer}
        expected = logits.double().softmax(-1)
        for label, score in scores.items():
            np.testing.assert_allclose(score, float(expected[bundle.manifest.labels.index(label)]), atol=1e-5)
    assert model.own().answer(TASKS[0], [picture]) == model.answer(TASKS[0], [picture])


def test_made_up_tasks_are_served_by_the_backbone_they_are_made_for(tmp_path: Path) -> None:
    from server.methods.registry import Registry

    spec = made_tasks.spec_of(Settings(backbone="untrained", backbone_weights=None))
    for method in ("linear", "vpt_deep"):
        bundle = made_tasks.bundle(spec, TASKS[0], method, 3, 0)
        Registry().check(bundle, spec)
        assert bundle.version != made_tasks.bundle(spec, TASKS[0], method, 3, 1).version


def turns(*cpu: float, latency: float) -> http.Turns:
    found = http.Turns()
    for ms in cpu:
        answers = [Answer(0.0, 0.0, latency / 1e3, 200, None)] * 4 + [Answer(0.0, 0.0, 9.0, 429, "1")]
        found.add(Seen(answers, 0.0, 1), 4 * ms / 1e3)
    return found


def test_ratios_are_medians_of_rounds_against_the_peer() -> None:
    found = {"uniform": {"lensrack": turns(1, 9, 3, latency=10), "LitServe, by task": turns(2, 3, 6, latency=400)}}
    options = argparse.Namespace(objective=250.0)
    report = http_report.report(found, {"4": found["uniform"]}, {"lensrack": 5.0}, None, options)
    ours, peer = report["closed"]["uniform"].values()
    assert (ours["cpu_ms"], ours["ratio"], peer["ratio"]) == (3, 0.5, 1)
    assert (ours["within_objective"], peer["within_objective"]) == (0.8, 0)
    assert (ours["asked"], ours["answered"], ours["p95_ms"]) == (15, 12, 10)
    told = http_report.tables({**report, "options": {"tasks": 2, "objective": 250}})
    assert "| lensrack | 3.0 | 0.5 |" in told
    assert "| LitServe, by task | 400.0 | 400.0 | 400.0 | 0.0% | 12 of 15 |" in told


def test_a_process_is_charged_with_its_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**6))']); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()  # its child has ended
        own = psutil.Process(process.pid).cpu_times()
        assert cpu_s(process.pid) >= own.user + own.children_user > own.user
        assert memory_mib(process.pid) > 1
        process.communicate("\n")
