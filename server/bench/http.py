"""`python -m server bench http`: the cost of a prediction over HTTP, compared with servers that one would write
instead.

Synthetic `vpt_deep` tasks in one store, JPEGs in, labels out. Our server, in float32 and in bfloat16 if the machine
supports it; a FastAPI app with a forward for each request; with `--peer`, a Python that has LitServe and PyTorch, a
LitServe app that sorts its batches by task, and the same app with a whole model for each task instead of one backbone
and prompts. Each is a separate process tree on loopback with the same environment and as many engine threads, on the
CPU. Rounds of all servers take turns. Closed loop, for each popularity of the tasks: CPU time of the server's processes
per request, the main figure, because it does not depend on other load, and its ratio to that of LitServe, by task, in
the same round. Open loop, requests by a Poisson process, latencies counted from when a request was due: percentiles,
and the share answered within the objective. Then memory, the highest at the end of a turn, after all tasks have been
used; next to it that of a process with a copy of the model for each task and no server. It is counted so that servers
that run at the same time do not make each other's smaller (`process_tree.py`). Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prompts_store import open_store
from server.engine.packed import can_pack
from server.settings import Settings

from . import http_report, http_targets, reporting, synthetic_tasks
from .http_figures import LoadResults, Measurements
from .http_targets import Target
from .load_generator import generate
from .process_tree import Memory, cpu_s, memory, paused

POPULARITIES = ("identical", "uniform", "zipf")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as name:
        folder = Path(name)
        store, tasks = _prepared(folder, options)
        with _all(folder, store, options) as targets:
            bench = Bench(targets, tasks, options)
            closed, opened = bench.rounds()
        memory_of = dict(bench.memory)
        copies = http_targets.copies(sys.executable, store) if options.copies else None
    seeds = "of each task its number; of arrivals and popularity that of the round"
    report = {
        **reporting.provenance("http", options, dtype="as the rows say, else float32", seeds=seeds),
        "backbone": Settings().backbone,
        **http_report.report(closed, opened, memory_of, copies, options),
    }
    reporting.emit(report, http_report.tables(report), options, http_report.draw)


def shares(popularity: str, tasks: int) -> list[float]:
    """How often each task is requested: weights."""
    if popularity == "identical":
        return [1.0] + [0.0] * (tasks - 1)
    if popularity == "uniform":
        return [1.0] * tasks
    return [1 / (rank + 1) for rank in range(tasks)]  # zipf with exponent 1


def _prepared(folder: Path, options: argparse.Namespace) -> tuple[str, tuple[str, ...]]:
    """The store's URL and its tasks; their pictures are in the folder."""
    url, tasks = f"file://{folder / 'store'}", synthetic_tasks.names(options.tasks)
    store = open_store(url)
    for _ in synthetic_tasks.publish(store, synthetic_tasks.spec_of(Settings()), tasks, "vpt_deep", options.prompts):
        pass
    store.close()
    pictures = synthetic_tasks.pictures(options.pictures, folder, min(16, options.tasks))
    http_targets.bodies(folder, tasks, pictures)
    return url, tasks


@contextmanager
def _all(folder: Path, store: str, options: argparse.Namespace) -> Iterator[list[Target]]:
    """All servers, running; LitServe last."""
    threads = _threads()
    on_cpu = {
        "LENSRACK_DEVICE": "cpu",
        "LENSRACK_DEVICES": "",
        "LENSRACK_THREADS": str(threads),
    }  # as for the other servers
    with ExitStack() as stack:
        up = stack.enter_context
        targets = [up(http_targets.ours("lensrack, float32", folder, store, "float32", on_cpu))]
        if can_pack(torch.device("cpu"), torch.bfloat16):
            targets.append(up(http_targets.ours("lensrack, bfloat16", folder, store, "bfloat16", on_cpu)))
        targets.append(up(http_targets.fastapi(sys.executable, folder, store, threads)))
        if options.peer is not None:
            how = http_targets.LitServe(str(options.peer), options.peer_batch, options.peer_wait, threads)
            targets.append(up(http_targets.litserve(how, folder, store)))
            if options.copies:
                targets.append(up(http_targets.litserve(how, folder, store, model_per_task=True)))
        yield targets


def _threads() -> int:
    """Engine threads of each server, as LENSRACK_THREADS sets them."""
    return Settings().threads or max(1, (os.cpu_count() or 1) - 1)


class Bench:
    """Rounds in which the servers take turns."""

    def __init__(self, targets: Sequence[Target], tasks: Sequence[str], options: argparse.Namespace) -> None:
        self._targets, self._tasks, self._options = targets, tasks, options
        self.memory = dict.fromkeys((target.name for target in targets), Memory(0, 0))

    def rounds(self) -> tuple[LoadResults, LoadResults]:
        options, closed, opened = self._options, LoadResults(), LoadResults()
        for target in self._targets:
            for task in self._tasks:  # one request per task, so that all lenses are made
                target.check(task)
        for turn in range(options.rounds):
            for popularity in options.popularity:
                self._closed(closed.setdefault(popularity, {}), popularity, turn)
            for rate in options.rates:
                self._open(opened.setdefault(f"{rate:g}", {}), rate, turn)
        return closed, opened

    def _closed(self, results: dict[str, Measurements], popularity: str, turn: int) -> None:
        weights = shares(popularity, len(self._tasks))
        for target in self._targets:
            plan = target.plan(self._tasks, weights)
            plan = replace(plan, requests=self._options.requests, clients=self._options.clients, seed=turn)
            self._ask(target, plan, results)

    def _open(self, results: dict[str, Measurements], rate: float, turn: int) -> None:
        weights = shares("uniform", len(self._tasks))
        for target in self._targets:
            plan = target.plan(self._tasks, weights)
            self._ask(target, replace(plan, seconds=self._options.seconds, rate=rate, seed=turn), results)

    def _ask(self, target: Target, plan: Any, results: dict[str, Measurements]) -> None:
        before = cpu_s(target.pid)
        with paused(*(other.pid for other in self._targets if other.polls and other is not target)):
            result = generate(plan)
        results.setdefault(target.name, Measurements()).add(result, cpu_s(target.pid) - before)
        self.memory[target.name] = max(self.memory[target.name], memory(target.pid))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench http",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--peer", type=Path, help="a Python that has LitServe, PyTorch and what the server needs")
    parser.add_argument("--peer-batch", type=int, default=16, help="largest batch of the LitServe app")
    parser.add_argument("--peer-wait", type=float, default=0.0, help="seconds that it waits for a batch to fill")
    parser.add_argument("--tasks", type=int, default=64, help="tasks in the store")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer")
    parser.add_argument("--pictures", type=Path, help="folder of pictures (default: drawn ones)")
    parser.add_argument(
        "--popularity", nargs="+", choices=POPULARITIES, default=POPULARITIES, help="popularities of the tasks"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every server")
    parser.add_argument("--requests", type=int, default=200, help="requests of a closed loop's turn")
    parser.add_argument("--clients", type=int, default=16, help="clients of the closed loop")
    parser.add_argument("--rates", type=float, nargs="*", default=[4.0], help="requests a second of the open loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of an open loop's turn")
    parser.add_argument("--objective", type=float, default=250.0, help="ms within which an answer is good (SLO)")
    parser.add_argument(
        "--copies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure a server and a process with a copy of the model for each task, too",
    )
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
