"""`python -m server bench training-load`: the effect of a training job on concurrent predictions.

A real server with its worker; clients send requests over sockets at a light, steady rate. Rounds without and with a
running job take turns, so that other load on the machine affects both. A request's latency counts from the moment it
was due, not from when a late client sent it. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from lensrack import wire
from server import __version__
from server.cli.sample_pictures import SETS, draw

from .plain_client import WAIT_S, PlainClient
from .temporary_server import temporary_server

KINDS = ("without a job", "with a job")


@dataclass
class Phase:
    """Figures of one kind over all rounds. Latencies in milliseconds."""

    latencies_ms: list[float] = field(default_factory=list)
    failures: int = 0
    steps: int = 0  # training steps during the measurement


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with temporary_server() as (url, home, _):
        bench = Bench(url, home, options)
        phases = bench.run()
        report = _report(bench.backbone, options, phases)
    Console().print(_table(report))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "training-load.json").write_text(json.dumps(report, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench training-load",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a phase")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both phases")
    parser.add_argument("--clients", type=int, default=4, help="client threads, each with its own connection")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second of each client")
    parser.add_argument(
        "--tasks", type=int, default=2, choices=range(1, len(SETS) + 1), help="tasks that receive requests"
    )
    parser.add_argument("--method", default="vpt_deep", help="method that the job fits")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures of the job's steps")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    return parser.parse_args(arguments)


class Bench:
    """One server, its tasks and its clients."""

    def __init__(self, url: str, home: Path, options: argparse.Namespace) -> None:
        self._server = PlainClient(url)
        self._url, self._options = url, options
        self.backbone = wire.Ready.model_validate(self._server.get("/readyz")).backbone
        self._pictures = home / "pictures"
        draw(self._pictures)
        self._tasks = sorted(SETS)[: options.tasks]

    def run(self) -> dict[str, Phase]:
        datasets = {task: self._server.upload(self._pictures / task / "train") for task in self._tasks}
        for task, dataset in datasets.items():
            self._server.ended(self._server.train(task, dataset, "linear", {"epochs": 20}))
        phases = {kind: Phase() for kind in KINDS}
        self._ask(1.0, Phase())  # lazy initialisation is not measured
        for _ in range(self._options.rounds):
            self._ask(self._options.seconds, phases[KINDS[0]])
            with self._training(datasets[self._tasks[0]]) as steps:
                before = steps()
                self._ask(self._options.seconds, phases[KINDS[1]])
                phases[KINDS[1]].steps += steps() - before
        self._server.close()
        return phases

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, seconds: float, phase: Phase) -> None:
        """Run all clients concurrently for `seconds`."""
        clients = self._options.clients
        together = threading.Barrier(clients)
        with ThreadPoolExecutor(clients) as pool:
            for part in pool.map(lambda number: self._one_client(number, seconds, together), range(clients)):
                phase.latencies_ms += part.latencies_ms
                phase.failures += part.failures

    def _one_client(self, number: int, seconds: float, together: threading.Barrier) -> Phase:
        task, seen = self._tasks[number % len(self._tasks)], Phase()
        picture = next((self._pictures / task / "test").rglob("*.png")).read_bytes()
        pause_s, headers = 1 / self._options.rate, {"Content-Type": "image/png"}
        with httpx.Client(base_url=self._url, timeout=WAIT_S) as http:
            together.wait()
            start = time.perf_counter() + number / self._options.clients * pause_s  # spread over one interval
            for turn in range(max(1, math.floor(seconds * self._options.rate))):
                due = start + turn * pause_s
                time.sleep(max(0.0, due - time.perf_counter()))
                answer = http.post(f"/predict/{task}", content=picture, headers=headers)
                seen.latencies_ms.append((time.perf_counter() - due) * 1e3)
                seen.failures += answer.status_code != 200
        return seen

    # --- training -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self, dataset: str) -> Iterator[Callable[[], int]]:
        """A running job; yields a function that returns its number of steps. The job is cancelled afterwards."""
        recipe = {"epochs": 1000, "batch_size": self._options.batch_size}
        job = self._server.train("load", dataset, self._options.method, recipe, publish="never")

        def steps() -> int:
            progress = self._server.job(job).progress
            return max(0, progress.epoch - 1) * progress.steps + progress.step

        self._server.until(lambda: steps() > 0)
        try:
            yield steps
        finally:
            self._server.cancel(job)
            self._server.until(lambda: self._server.job(job).finished)


# --- the report -------------------------------------------------------------------------------------------------------


def _report(backbone: wire.Backbone | None, options: argparse.Namespace, phases: dict[str, Phase]) -> dict[str, Any]:
    figures = {kind: _figures(phase) for kind, phase in phases.items()}
    calm, busy = (figures[kind] for kind in KINDS)
    return {
        "benchmark": "training-load",
        "backbone": backbone.model_dump() if backbone else None,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg(), "torch": torch.__version__},
        "lensrack": __version__,
        "figures": figures,
        "ratio": {name: round(busy[name] / calm[name], 2) for name in ("p50_ms", "p99_ms")},
        "phases": {kind: asdict(phase) for kind, phase in phases.items()},
    }


def _figures(phase: Phase) -> dict[str, Any]:
    ordered = sorted(phase.latencies_ms)
    percentiles = {f"p{share}_ms": round(_percentile(ordered, share), 2) for share in (50, 99)}
    return {"requests": len(ordered), "failures": phase.failures, **percentiles, "training_steps": phase.steps}


def _percentile(ordered: Sequence[float], share: int) -> float:
    """The nearest rank: a latency that was measured."""
    return ordered[math.ceil(share / 100 * len(ordered)) - 1]


def _table(report: dict[str, Any]) -> Table:
    options, backbone = report["options"], report["backbone"]
    title = (
        f"{options['clients']} clients, {options['rate']:g} requests/s each, {options['tasks']} tasks, "
        f"{backbone['arch']} on {backbone['device']}, {report['machine']['cores']} cores"
    )
    columns = ("", "requests", "failures", "p50 ms", "p99 ms", "training steps")
    table = Table(*columns, title=title)
    for kind, figures in report["figures"].items():
        table.add_row(kind, *map(str, figures.values()))
    table.add_row("ratio", "", "", *(f"{report['ratio'][name]:.2f}" for name in ("p50_ms", "p99_ms")), "")
    return table


if __name__ == "__main__":
    main()
