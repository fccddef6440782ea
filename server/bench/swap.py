"""`python -m server bench swap`: the time until a published version answers, and the effect on other tasks.

A temporary server with two tasks. This process acts as a worker: it puts a version that no server has seen into the
store and points `live` at it, while one client sends requests to that task without a pause and another sends requests
to the second task at a steady rate. Reported are the times from the moment the alias has moved to the first answer of
the new version, which include everything in between: the notification, reading the bundle, making the lens, writing it
to the rack, one forward, and often an answer of the old version that was in flight; next to them the time of any
answer. And the second task's latencies from the intended moment, in rounds without and with swaps, in turns; the first
task receives requests in both. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from prompts_store import Bundle, Store, open_store
from server.cli.sample_pictures import draw

from . import reporting
from .plain_client import WAIT_S, PlainClient
from .svg import Panel, bars
from .temporary_redis import temporary_redis
from .temporary_server import temporary_server

SWAPPED, NEIGHBOUR = "fruit", "weather"


@dataclass
class SwapTimes:
    """Times in ms. `first_answer`: of each swap; `any_answer`: of that task; `calm` and `busy`: the neighbour's
    latencies."""

    first_answer: list[float] = field(default_factory=list)
    any_answer: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    failures: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with ExitStack() as stack:
        url = stack.enter_context(temporary_redis()) if options.redis else ""
        server, home, _ = stack.enter_context(temporary_server(store=url))
        client = stack.enter_context(closing(PlainClient(server)))
        _fit(client, home, options)
        store = stack.enter_context(closing(open_store(url or f"file://{home / 'store'}")))
        report = _report(Bench(server, home, store, options).run(), client, options)
    reporting.emit(report, table(report), options, draw_bars)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m server bench swap", description=about)
    parser.add_argument("--redis", action="store_true", help="use a temporary redis-server instead of files")
    parser.add_argument(
        "--method", default="vpt_deep", help="method of the task that is published (default: %(default)s)"
    )
    parser.add_argument("--swaps", type=int, default=20, help="swaps of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns without and with swaps (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between swaps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=20.0, help="the neighbour's requests a second")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    first, calm, busy = (report[name] for name in ("first_answer_ms", "neighbour_calm_ms", "neighbour_swapping_ms"))
    rows = [
        ("published → first answer of the new version", first),
        ("any answer of that task, without swaps", report["any_answer_ms"]),
        ("neighbour, calm", calm),
        ("neighbour, beside swaps", busy),
    ]
    lines = [
        f"| {report['store']} store, {report['backbone']} | p50 ms | p99 ms | worst ms | of |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(
        lines
        + [f"| {name} | {at['p50']:.1f} | {at['p99']:.1f} | {at['worst']:.1f} | {at['count']} |" for name, at in rows]
    )


def draw_bars(report: Mapping[str, Any]) -> str:
    """SVG: p50, p99 and the worst of each kind of answer."""
    kinds = {
        "first answer of the new version": "first_answer_ms",
        "any answer of that task": "any_answer_ms",
        "neighbour, calm": "neighbour_calm_ms",
        "neighbour, beside swaps": "neighbour_swapping_ms",
    }
    panels = [
        Panel(at, "ms", {name: report[key][at] for name, key in kinds.items()}, ours=[*kinds][:1])
        for at in ("p50", "p99", "worst")
    ]
    return bars(panels)


def _fit(client: PlainClient, home: Path, options: argparse.Namespace) -> None:
    draw(home / "pictures")
    for task, method in (SWAPPED, options.method), (NEIGHBOUR, "linear"):
        dataset = client.upload(home / "pictures" / task / "train")
        client.ended(client.train(task, dataset, method, {"epochs": 1}))


class Bench:
    """A server, its store, and a picture for each task."""

    def __init__(self, url: str, home: Path, store: Store, options: argparse.Namespace) -> None:
        self._url, self._store, self._options, self.times = url, store, options, SwapTimes()
        tests = home / "pictures"
        self._pictures = {
            task: next((tests / task / "test").rglob("*.png")).read_bytes() for task in (SWAPPED, NEIGHBOUR)
        }

    def run(self) -> SwapTimes:
        seconds = self._options.swaps * (self._options.pause + 0.05)
        self._neighbour(1.0, [])  # lazy initialisation is not measured
        for turn in range(self._options.rounds):
            with self._with_neighbour(seconds, self.times.calm):
                self._ask(seconds)
            with self._with_neighbour(seconds, self.times.busy):
                self._swap(turn * self._options.swaps)
        return self.times

    @contextmanager
    def _with_neighbour(self, seconds: float, into: list[float]) -> Iterator[None]:
        beside = threading.Thread(target=self._neighbour, args=(seconds, into))
        beside.start()
        try:
            yield
        finally:
            beside.join()

    def _ask(self, seconds: float) -> None:
        """Requests to the task that is published in other rounds, as many as it gets there."""
        with httpx.Client(base_url=self._url, timeout=WAIT_S) as http:
            end = time.perf_counter() + seconds
            while (began := time.perf_counter()) < end:
                self._answering(http, SWAPPED)
                self.times.any_answer.append((time.perf_counter() - began) * 1e3)
                if len(self.times.any_answer) % 2 == 0:
                    time.sleep(self._options.pause)

    def _swap(self, done: int) -> None:
        """Publish `--swaps` versions, one after the other, and send requests until each answers."""
        live = self._store.aliases(SWAPPED)["live"].targets[0].version
        parent = self._store.get(SWAPPED, live)
        with httpx.Client(base_url=self._url, timeout=WAIT_S) as http:
            for number in range(done + 1, done + 1 + self._options.swaps):
                version = self._store.put(_changed(parent, 1e-3 * number))
                self._store.set_alias(SWAPPED, "live", version)
                moved = time.perf_counter()
                while self._answering(http, SWAPPED) != version:
                    if time.perf_counter() - moved > WAIT_S:
                        raise RuntimeError(f"version {version[:12]} does not answer")
                self.times.first_answer.append((time.perf_counter() - moved) * 1e3)
                time.sleep(self._options.pause)

    def _neighbour(self, seconds: float, into: list[float]) -> None:
        """Send requests at a steady rate; a latency counts from when the request was due."""
        rate = self._options.rate
        with httpx.Client(base_url=self._url, timeout=WAIT_S) as http:
            start = time.perf_counter()
            for number in range(max(1, math.floor(seconds * rate))):
                due = start + number / rate
                time.sleep(max(0.0, due - time.perf_counter()))
                try:
                    self._answering(http, NEIGHBOUR)
                except httpx.HTTPError:
                    self.times.failures += 1
                into.append((time.perf_counter() - due) * 1e3)

    def _answering(self, http: httpx.Client, task: str) -> str:
        """The version that answers."""
        answer = http.post(f"/predict/{task}", content=self._pictures[task], headers={"Content-Type": "image/png"})
        answer.raise_for_status()
        return str(answer.json()["version"])


def _changed(parent: Bundle, by: float) -> Bundle:
    """A version that differs in its head's bias."""
    tensors = {name: value.copy() for name, value in parent.tensors.items()}
    tensors["head.bias"] = tensors["head.bias"] + tensors["head.bias"].dtype.type(by)
    return Bundle.build(parent.manifest, tensors)


def _report(times: SwapTimes, client: PlainClient, options: argparse.Namespace) -> dict[str, Any]:
    backbone = client.get("/readyz")["backbone"]
    return {
        **reporting.provenance("swap", options, dtype=backbone["dtype"], seeds="0, of the pictures"),
        "store": "Redis" if options.redis else "file",
        "backbone": backbone["arch"],
        "method": options.method,
        "failures": times.failures,
        "first_answer_ms": _figures(times.first_answer),
        "any_answer_ms": _figures(times.any_answer),
        "neighbour_calm_ms": _figures(times.calm),
        "neighbour_swapping_ms": _figures(times.busy),
    }


def _figures(latencies: Sequence[float]) -> dict[str, float]:
    """Percentiles by nearest rank, which are measured latencies."""
    ordered = sorted(latencies)
    p50, p99 = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
    return {"p50": round(p50, 2), "p99": round(p99, 2), "worst": round(ordered[-1], 2), "count": len(ordered)}


if __name__ == "__main__":
    main()
