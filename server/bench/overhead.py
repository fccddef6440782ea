"""`python -m server bench overhead`: CPU time of a request when the model costs nothing.

Our server with an engine that answers immediately; the lower bound, uvicorn with an application that only reads the
body; and, if `--peer` names a Python that has LitServe, a LitServe app whose model returns its input. Each is a
separate process tree on loopback. A load generator in a separate process sends requests to each in a closed loop, in
turns, round after round, with few clients and with many. Reported are the trees' CPU times per request, medians of the
rounds, and their ratio to the peer's for the same kind of request: `pixels` is a picture of the backbone's size,
uncompressed; `small` the least that each accepts, for the peer a number as JSON, for ours a PNG of one pixel, which it
decodes and resizes; PNG a picture to decode. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from prompts_store import open_store
from server.settings import Settings

from . import reporting, synthetic_tasks
from .load_generator import Plan, generate
from .peer_process import stop, wait_until_well
from .process_tree import cpu_s
from .svg import Panel, bars
from .temporary_server import ROOT, temporary_server

[TASK] = synthetic_tasks.names(1)
START_S = 120.0
PEER = "LitServe"


@dataclass(frozen=True)
class Endpoint:
    """A server and one kind of request. `pid`: root of the process tree whose cost counts; `body` is a file."""

    server: str
    question: str
    port: int
    path: str
    body: Path
    content_type: str
    pid: int

    @property
    def name(self) -> str:
        return f"{self.server}, {self.question}"


@dataclass(frozen=True)
class Bodies:
    """The bodies of the requests, as files."""

    npy: Path
    png: Path
    speck: Path  # a PNG of one pixel
    number: Path
    base64: Path

    @classmethod
    def drawn(cls, folder: Path, size: int) -> Bodies:
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        bodies = cls(*(folder / name for name in ("npy", "png", "speck", "number", "base64")))
        np.save(raw := io.BytesIO(), pixels)
        bodies.npy.write_bytes(raw.getvalue())
        Image.fromarray(pixels).save(bodies.png, "PNG")
        Image.fromarray(pixels[:1, :1]).save(bodies.speck, "PNG")
        bodies.number.write_bytes(b'{"input": 4.0}')
        bodies.base64.write_text(json.dumps({"pixels": base64.b64encode(pixels.tobytes()).decode()}))
        return bodies


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        spec = synthetic_tasks.spec_of(Settings())
        bodies = Bodies.drawn(folder, spec.image_size)
        store = open_store(url := f"file://{folder / 'store'}")
        list(synthetic_tasks.publish(store, spec, [TASK], "linear", 0))
        store.close()
        endpoints = [*stack.enter_context(_ours(url, bodies)), *stack.enter_context(_bare(bodies))]
        if options.peer is not None:
            endpoints += stack.enter_context(_litserve(options.peer, max(options.clients), bodies))
        figures = {f"{clients}": _measure(endpoints, clients, options) for clients in options.clients}
    header = reporting.provenance("overhead", options, dtype="none: nothing is computed", seeds="0, of the pixels")
    report = {**header, "image_size": spec.image_size, "cpu_ms": figures}
    reporting.emit(report, table(report), options, draw)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m server bench overhead", description=about)
    parser.add_argument("--peer", type=Path, help="a Python that has LitServe")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="concurrent clients")
    parser.add_argument("--requests", type=int, default=1000, help="requests of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


def table(report: dict[str, Any]) -> str:
    """Markdown: milliseconds, and in brackets the ratio to the peer for the same kind of request."""
    figures: dict[str, dict[str, float]] = report["cpu_ms"]
    head = [f"{clients} client{'s' if clients != '1' else ''}" for clients in figures]
    lines = [f"| CPU ms a request | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name in next(iter(figures.values())):
        cells = [_cell(times, name) for times in figures.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: Mapping[str, Any]) -> str:
    """SVG: a panel for each number of clients."""
    figures: dict[str, dict[str, float]] = report["cpu_ms"]
    ours = [name for name in next(iter(figures.values())) if name.startswith("lensrack")]
    return bars([Panel(f"clients: {clients}", "CPU ms a request", times, ours) for clients, times in figures.items()])


def _cell(times: dict[str, float], name: str) -> str:
    ms, like = times[name], times.get(f"{PEER}, {name.rpartition(', ')[2]}")
    return f"{ms:.2f}" if like is None else f"{ms:.2f} ({ms / like:.2f})"


def _measure(endpoints: Sequence[Endpoint], clients: int, options: argparse.Namespace) -> dict[str, float]:
    spent: dict[str, list[float]] = {endpoint.name: [] for endpoint in endpoints}
    for turn in range(options.rounds + 1):  # the first pays for set-up
        for endpoint in endpoints:
            ms = _round(endpoint, clients, options.requests)
            if turn:
                spent[endpoint.name].append(ms)
    return {name: round(statistics.median(times), 3) for name, times in spent.items()}


def _round(target: Endpoint, clients: int, requests: int) -> float:
    plan = Plan(
        "127.0.0.1", target.port, target.path, str(target.body), target.content_type, requests=requests, clients=clients
    )
    before = cpu_s(target.pid)
    result = generate(plan)
    spent = cpu_s(target.pid) - before
    if any(answer.status != 200 for answer in result.answers):
        raise RuntimeError(f"{target.name}: expected 200, got {sorted({answer.status for answer in result.answers})}")
    return spent / requests * 1e3


@contextmanager
def _ours(store: str, bodies: Bodies) -> Iterator[list[Endpoint]]:
    """Our server, without a worker: there is nothing to fit."""
    settings = {"LENSRACK_WORKERS": "0", "LENSRACK_SAMPLE_TASKS": "false"}
    with temporary_server("server.bench.noop_server", store, settings) as (url, _, pid):
        port, path = urlsplit(url).port or 0, f"/predict/{TASK}"
        yield [
            Endpoint("lensrack", "pixels", port, path, bodies.npy, "application/x-npy", pid),
            Endpoint("lensrack", "small", port, path, bodies.speck, "image/png", pid),
            Endpoint("lensrack", "PNG", port, path, bodies.png, "image/png", pid),
        ]


@contextmanager
def _bare(bodies: Bodies) -> Iterator[list[Endpoint]]:
    with _process([sys.executable, "-m", "server.bench.bare_server"], []) as (port, pid):
        yield [
            Endpoint("uvicorn alone", "pixels", port, "/", bodies.npy, "application/x-npy", pid),
            Endpoint("uvicorn alone", "small", port, "/", bodies.number, "application/json", pid),
        ]


@contextmanager
def _litserve(python: Path, batch: int, bodies: Bodies) -> Iterator[list[Endpoint]]:
    with _process([str(python), "-m", "server.bench.identity_peer"], [str(batch)]) as (port, pid):
        yield [
            Endpoint(PEER, "pixels", port, "/predict", bodies.base64, "application/json", pid),
            Endpoint(PEER, "small", port, "/predict", bodies.number, "application/json", pid),
        ]


@contextmanager
def _process(command: Sequence[str], more: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Start a server on a free port, its first argument; yield the port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, str(port), *more], cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_until_well(process, f"http://127.0.0.1:{port}/health", START_S)
            yield port, process.pid
        finally:
            stop(process)


if __name__ == "__main__":
    main()
