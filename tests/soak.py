"""`python -m tests.soak`: does a server grow? Predictions, load/predict/unload cycles and train jobs, many of each.

A real server, a front end and an engine, with its worker on the small stand-in for a backbone, which has seen batches
of every size before anything is read. Each kind of work comes in portions; after a portion everything is idle, its
connections are closed, and resident memory and file descriptors of each process are read. The first quarter of a kind's
readings is compared with its last: memory may have grown by the band (MiB), and descriptors by theirs. Status 1 where
one has not stayed in its band.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from server.bench.load_generator import Plan, generate
from server.bench.plain_client import PlainClient
from server.cli.sample_pictures import draw
from tests.e2e.server_process import serving

MIB = 2**20
PORTIONS = 20
SETTLE_S = 0.5  # for sockets that were closed a moment ago
PROCESSES = ("front end", "engine", "worker")
JOBS_AT_ONCE = 4
CLIENTS = 64  # two full batches


@dataclass(frozen=True)
class Reading:
    rss_mib: float
    fds: int


@dataclass(frozen=True)
class Growth:
    """Of one process over one kind of work: medians of the first and the last quarter of the readings. `path_mib`: what
    was read of memory after each portion, in their order."""

    work: str
    done: int
    process: str
    rss_mib: tuple[float, float]
    fds: tuple[float, float]
    inside: bool
    path_mib: tuple[float, ...] = ()

    @property
    def kib_each(self) -> float:
        """By what one more piece of work made the process larger, if it was that."""
        return (self.rss_mib[1] - self.rss_mib[0]) * 1024 / max(1, 0.75 * self.done)


def growth(work: str, done: int, process: str, readings: Sequence[Reading], band: argparse.Namespace) -> Growth:
    quarter = max(1, len(readings) // 4)
    rss = _ends([one.rss_mib for one in readings], quarter)
    fds = _ends([one.fds for one in readings], quarter)
    inside = rss[1] - rss[0] <= band.rss_mib and fds[1] - fds[0] <= band.fds
    return Growth(work, done, process, rss, fds, inside, tuple(one.rss_mib for one in readings))


def _ends(values: Sequence[float], quarter: int) -> tuple[float, float]:
    return round(statistics.median(values[:quarter]), 1), round(statistics.median(values[-quarter:]), 1)


def portions(count: int) -> Iterator[int]:
    """`count` in at most PORTIONS nearly equal parts."""
    parts = min(PORTIONS, count)
    for number in range(parts):
        yield count * (number + 1) // parts - count * number // parts


class Soak:
    """One server, and the ways to keep it at work."""

    def __init__(self, url: str, pid: int, pictures: Path) -> None:
        self._url, self._pid, self._server = url, pid, PlainClient(url)
        draw(pictures, per_class=4)
        self._picture = next((pictures / "fruit" / "test").rglob("*.png"))
        self._dataset = self._server.upload(pictures / "fruit" / "train")
        self._jobs = 0
        self.train(2)  # `vpt_deep` is live: it has prompts to load

    def close(self) -> None:
        self._server.close()

    def warm_up(self, most: int) -> None:
        """Crowds of up to `most`, and so batches of every size: each has kernels and buffers of its own, which come
        with the first of it and stay."""
        for clients in range(1, most + 1):
            self.predict(4 * clients, clients)

    def predict(self, count: int, clients: int = CLIENTS) -> None:
        place = urlsplit(self._url)
        plan = Plan(place.hostname or "", place.port or 0, "/predict/soak", str(self._picture), "image/png")
        seen = generate(Plan(**{**asdict(plan), "requests": count, "clients": min(clients, count)}))
        if odd := [one.status for one in seen.answers if one.status != 200]:
            raise RuntimeError(f"{len(odd)} of {count} predictions failed, the first with {odd[0]}")

    def cycle(self, count: int) -> None:
        """Onto the device, a question, off the device."""
        body, headers = self._picture.read_bytes(), {"Content-Type": "image/png"}
        with httpx.Client(base_url=self._url, timeout=120) as http:
            for _ in range(count):
                http.post("/tasks/soak/load").raise_for_status()
                http.post("/predict/soak", content=body, headers=headers).raise_for_status()
                http.post("/tasks/soak/unload").raise_for_status()

    def train(self, count: int) -> None:
        """Tiny jobs, `linear` and `vpt_deep` in turns, each with a seed of its own and each published."""
        waiting: list[str] = []
        for _ in range(count):
            method, recipe = ("linear", "vpt_deep")[self._jobs % 2], {"epochs": 1, "seed": self._jobs}
            waiting.append(self._server.train("soak", self._dataset, method, recipe))
            self._jobs += 1
            if len(waiting) == JOBS_AT_ONCE:
                self._server.ended(waiting.pop(0))
        for job in waiting:
            self._server.ended(job)

    def read(self) -> dict[str, Reading]:
        time.sleep(SETTLE_S)
        house = psutil.Process(self._pid)
        worker = next(child for child in house.children(recursive=True) if child.name().startswith("worker"))
        engine, front = sorted(
            (child for child in house.children() if child.pid != worker.pid), key=psutil.Process.create_time
        )  # front ends are forked when the engine is ready
        return {name: _reading(process) for name, process in zip(PROCESSES, (front, engine, worker), strict=True)}


def _reading(process: psutil.Process) -> Reading:
    return Reading(round(process.memory_info().rss / MIB, 1), process.num_fds())


def measured(name: str, work: Callable[[int], None], soak: Soak, options: argparse.Namespace) -> list[Growth]:
    """As much of a kind of work as its count and the time allow."""
    seen: dict[str, list[Reading]] = {process: [] for process in PROCESSES}
    done, began = 0, time.monotonic()
    for portion in portions(getattr(options, name)):
        work(portion)
        done += portion
        for process, reading in soak.read().items():
            seen[process].append(reading)
        if options.seconds and time.monotonic() - began > options.seconds:
            break
    return [growth(name, done, process, readings, options) for process, readings in seen.items() if readings]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="lensrack-soak-") as folder,
        serving(Path(folder) / "home", fronts="1") as server,
        closing(Soak(server.url, server.process.pid, Path(folder) / "pictures")) as soak,
    ):
        soak.warm_up(options.warm_up)
        kinds = {"predictions": soak.predict, "cycles": soak.cycle, "jobs": soak.train}
        found = [one for name, work in kinds.items() for one in measured(name, work, soak, options)]
    print(table(found, options))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0 if all(one.inside for one in found) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--predictions", type=int, default=100_000, help="one picture each")
    parser.add_argument("--cycles", type=int, default=1_000, help="load, predict, unload")
    parser.add_argument("--jobs", type=int, default=200, help="tiny ones")
    parser.add_argument(
        "--warm-up", type=int, default=CLIENTS, help="the largest crowd that asks before anything counts"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="longest time for each kind of work; 0: no limit")
    parser.add_argument("--rss-mib", type=float, default=32.0, help="by which a process may grow in a kind of work")
    parser.add_argument("--fds", type=float, default=4.0, help="by which its open file descriptors may")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


def table(found: Sequence[Growth], options: argparse.Namespace) -> str:
    """Markdown."""
    band = f"band: {options.rss_mib:+g} MiB, {options.fds:+g} descriptors"
    lines = [f"| work | process | RSS MiB | KiB each | descriptors | {band} |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [_line(one) for one in found])


def _line(one: Growth) -> str:
    rss, fds = (f"{first:g} → {last:g}" for first, last in (one.rss_mib, one.fds))
    verdict = "inside" if one.inside else "**outside**"
    return f"| {one.done:,} {one.work} | {one.process} | {rss} | {one.kib_each:.2f} | {fds} | {verdict} |"


if __name__ == "__main__":
    raise SystemExit(main())
