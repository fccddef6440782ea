"""`python -m server bench overhead`: CPU time of a request when the model costs nothing.

Our server with an engine that answers at once; the floor, uvicorn with an application that only reads the body; and, if
`--peer` names a Python that has LitServe, a LitServe app whose model gives back what it gets. Each is a
process tree of its own on loopback. A crowd in a process of its own asks each in a closed loop, in turns, round after
round, with few clients and with many. What is told is the trees' CPU time by request, medians of the rounds, and its
ratio to the peer's for the same question: `pixels` is a picture of the backbone's size, uncompressed; `small` the least
that each takes, the peer a number as JSON, ours a PNG of one pixel, which it decodes and resizes; PNG a picture to
decode. Nothing is asserted.
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

from . import made_tasks, telling
from .load_generator import Plan, generate
from .own_server import ROOT, own_server
from .peer_process import stop, wait_until_well
from .process_tree import cpu_s
from .svg import Panel, bars

[TASK] = made_tasks.names(1)
START_S = 120.0
PEER = "LitServe"


@dataclass(frozen=True)
class Asked:
    """What is asked of whom. `pid`: of the process whose tree is charged; `body` lies in a file."""

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
    """The questions, as files."""

    npy: Path
    png: Path
    speck: Path  # a PNG of one pixel
    number: Path
    base64: Path

    @classmethod
    def drawn(cls, folder: Path, size: int) -> Bodies:
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        own = cls(*(folder / name for name in ("npy", "png", "speck", "number", "base64")))
        np.save(raw := io.BytesIO(), pixels)
        own.npy.write_bytes(raw.getvalue())
        Image.fromarray(pixels).save(own.png, "PNG")
        Image.fromarray(pixels[:1, :1]).save(own.speck, "PNG")
        own.number.write_bytes(b'{"input": 4.0}')
        own.base64.write_text(json.dumps({"pixels": base64.b64encode(pixels.tobytes()).decode()}))
        return own


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        spec = made_tasks.spec_of(Settings())
        bodies = Bodies.drawn(folder, spec.image_size)
        store = open_store(url := f"file://{folder / 'store'}")
        list(made_tasks.publish(store, spec, [TASK], "linear", 0))
        store.close()
        asked = [*stack.enter_context(_ours(url, bodies)), *stack.enter_context(_bare(bodies))]
        if options.peer is not None:
            asked += stack.enter_context(_litserve(options.peer, max(options.clients), bodies))
        figures = {f"{clients}": _measure(asked, clients, options) for clients in options.clients}
    told = telling.stated("overhead", options, dtype="none: nothing is computed", seeds="0, of the pixels")
    report = {**told, "image_size": spec.image_size, "cpu_ms": figures}
    telling.tell(report, table(report), options, draw)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m server bench overhead", description=about)
    parser.add_argument("--peer", type=Path, help="a Python that has LitServe")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="that ask at once")
    parser.add_argument("--requests", type=int, default=1000, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    telling.add_files(parser)
    return parser.parse_args(arguments)


def table(report: dict[str, Any]) -> str:
    """Markdown: milliseconds, and in brackets the ratio to the peer that was asked the same."""
    figures: dict[str, dict[str, float]] = report["cpu_ms"]
    head = [f"{clients} client{'s' if clients != '1' else ''}" for clients in figures]
    lines = [f"| CPU ms a request | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name in next(iter(figures.values())):
        cells = [_cell(found, name) for found in figures.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: Mapping[str, Any]) -> str:
    """SVG: a panel for each number of clients."""
    figures: dict[str, dict[str, float]] = report["cpu_ms"]
    ours = [name for name in next(iter(figures.values())) if name.startswith("lensrack")]
    return bars([Panel(f"clients: {clients}", "CPU ms a request", found, ours) for clients, found in figures.items()])


def _cell(found: dict[str, float], name: str) -> str:
    ms, like = found[name], found.get(f"{PEER}, {name.rpartition(', ')[2]}")
    return f"{ms:.2f}" if like is None else f"{ms:.2f} ({ms / like:.2f})"


def _measure(asked: Sequence[Asked], clients: int, options: argparse.Namespace) -> dict[str, float]:
    spent: dict[str, list[float]] = {one.name: [] for one in asked}
    for turn in range(options.rounds + 1):  # the first pays for set-up
        for one in asked:
            ms = _round(one, clients, options.requests)
            if turn:
                spent[one.name].append(ms)
    return {name: round(statistics.median(found), 3) for name, found in spent.items()}


def _round(one: Asked, clients: int, requests: int) -> float:
    plan = Plan(
        "127.0.0.1", one.port, one.path, str(one.body), one.content_type, requests=requests, clients=clients
    )  # fmt: skip
    before = cpu_s(one.pid)
    seen = generate(plan)
    spent = cpu_s(one.pid) - before
    if any(answer.status != 200 for answer in seen.answers):
        raise RuntimeError(f"{one.name}: expected 200, got {sorted({answer.status for answer in seen.answers})}")
    return spent / requests * 1e3


@contextmanager
def _ours(store: str, bodies: Bodies) -> Iterator[list[Asked]]:
    """Without a worker: there is nothing to fit."""
    settings = {"LENSRACK_WORKERS": "0", "LENSRACK_SAMPLE_TASKS": "false"}
    with own_server("server.bench.noop_server", store, settings) as (url, _, pid):
        port, path = urlsplit(url).port or 0, f"/predict/{TASK}"
        yield [
            Asked("lensrack", "pixels", port, path, bodies.npy, "application/x-npy", pid),
            Asked("lensrack", "small", port, path, bodies.speck, "image/png", pid),
            Asked("lensrack", "PNG", port, path, bodies.png, "image/png", pid),
        ]


@contextmanager
def _bare(bodies: Bodies) -> Iterator[list[Asked]]:
    with _process([sys.executable, "-m", "server.bench.bare_server"], []) as (port, pid):
        yield [
            Asked("uvicorn alone", "pixels", port, "/", bodies.npy, "application/x-npy", pid),
            Asked("uvicorn alone", "small", port, "/", bodies.number, "application/json", pid),
        ]


@contextmanager
def _litserve(python: Path, batch: int, bodies: Bodies) -> Iterator[list[Asked]]:
    with _process([str(python), "-m", "server.bench.identity_peer"], [str(batch)]) as (port, pid):
        yield [
            Asked(PEER, "pixels", port, "/predict", bodies.base64, "application/json", pid),
            Asked(PEER, "small", port, "/predict", bodies.number, "application/json", pid),
        ]


@contextmanager
def _process(command: Sequence[str], more: Sequence[str]) -> Iterator[tuple[int, int]]:
    """A server on a free port, which it is told before the rest, and its process."""
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
