"""`python -m server bench rack`: ten thousand tasks, a thousand slots: hit rates, and the cost of a miss.

The store, the cache, the loader and the rack of a server, without HTTP and without forwards. Synthetic tasks are put
into a store of files, or of Redis; then tasks are requested one after the other, drawn by Zipf's law. Each request
records where the task was found: on the device (a seat is taken), in host memory (decoded bundles), or in the store;
and the time until it had a seat. Then, with `--swaps`, tasks are drawn uniformly until that many lenses have been
evicted for others, while the process's memory is read. Files are in the system's page cache, as on a server with memory
to spare. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from prompts_store import Bundle, CachedStore, Store, open_store
from server.app.engine_runtime import build_residency
from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.engine.rack import Rack
from server.engine.residency import Residency
from server.methods.registry import Registry
from server.settings import Settings

from . import reporting, synthetic_tasks
from .figures import latencies
from .process_tree import rss_mib
from .svg import LINES, OURS, as_svg, style
from .temporary_redis import temporary_redis

DEVICE, HOST = "device", "host memory"
READINGS = 100  # of memory, over all swaps


class CountingStore:
    """A store that counts the bundles it returns."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.gets = inner, 0

    def get(self, task: str, version: str) -> Bundle:
        self.gets += 1
        return self._inner.get(task, version)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass
class SeatTimes:
    """Milliseconds until a seat was ready, by where the task was found."""

    ms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, tier: str, ms: float) -> None:
        self.ms.setdefault(tier, []).append(ms)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lensrack-bench-")))
        url = stack.enter_context(temporary_redis()) if options.redis else f"file://{folder / 'store'}"
        settings = Settings()
        backbone = engine_backbone.load(settings.backbone, settings.backbone_weights, device="cpu")
        report = asyncio.run(_measured(url, backbone, options))
    reporting.emit(report, table(report), options, draw)


def _published(url: str, backbone: Backbone, options: argparse.Namespace) -> list[tuple[str, str]]:
    """(task, version) of each."""
    store, tasks = open_store(url), synthetic_tasks.names(options.tasks)
    made = list(
        zip(tasks, synthetic_tasks.publish(store, backbone.spec, tasks, options.method, options.prompts), strict=True)
    )
    store.close()
    return made


async def _measured(url: str, backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    made = _published(url, backbone, options)
    published_s = time.perf_counter() - began
    bundle_bytes = 0
    with _rack(url, backbone, options) as (residency, rack, counted):
        bench = Bench(residency, counted, made, "Redis" if options.redis else "file", options.seed)
        for task, version in made:  # load every task once, so that caches per task are filled
            await residency.load(task, version)
        times = await bench.zipf(options.requests)
        swaps = await bench.swaps(options.swaps) if options.swaps else None
        residency.check_integrity()
        bundle_bytes = len(counted.get(*made[0]).data)
        used = rack.used_slots
    dtype, seeds = str(backbone.dtype).removeprefix("torch."), f"{options.seed}, of the tasks that are drawn"
    header = reporting.provenance("rack", options, dtype=dtype, seeds=seeds)
    return {
        **header,
        "backbone": backbone.spec.arch,
        "store": bench.store,
        "published_s": round(published_s, 1),
        "bundle_bytes": bundle_bytes,
        "resident": used,
        "tiers": _tiers(times),
        "swaps": swaps,
    }


@contextmanager
def _rack(url: str, backbone: Backbone, options: argparse.Namespace) -> Iterator[tuple[Residency, Rack, CountingStore]]:
    counted = CountingStore(open_store(url))
    store = CachedStore(cast(Store, counted), max_bytes=int(options.cache_mib * 2**20))
    rack = Rack.sized(
        dim=backbone.spec.dim,
        slots=options.slots,
        size_bytes=Settings().rack_bytes,
        device=backbone.device,
        dtype=backbone.dtype,
    )
    pool = ThreadPoolExecutor(2, thread_name_prefix="load")
    try:
        yield build_residency(rack, Registry(), store, backbone, pool), rack, counted
    finally:
        pool.shutdown()
        store.close()


class Bench:
    """Requests seats, one after the other."""

    def __init__(
        self, residency: Residency, counted: CountingStore, made: Sequence[tuple[str, str]], store: str, seed: int
    ) -> None:
        self._residency, self._counted, self.store = residency, counted, store
        self._chance = random.Random(seed)
        self._made = list(made)
        self._chance.shuffle(self._made)  # popular tasks must not be those that were published first

    async def zipf(self, requests: int) -> SeatTimes:
        """Times by Zipf's law, after half as many requests that fill the rack."""
        weights = list(accumulate(1 / (rank + 1) for rank in range(len(self._made))))
        drawn = self._chance.choices(self._made, cum_weights=weights, k=requests + requests // 2)
        times = SeatTimes()
        for number, (task, version) in enumerate(drawn):
            tier, ms = await self._seat(task, version)
            if number >= requests // 2:
                times.add(tier, ms)
        return times

    async def swaps(self, count: int) -> dict[str, Any]:
        """Request seats until `count` lenses have been evicted for others."""
        counts, memory = self._residency.counts, [rss_mib()]
        first, began, requests = counts.evictions, time.perf_counter(), 0
        for reading in range(1, READINGS + 1):
            while counts.evictions - first < count * reading // READINGS:
                await self._seat(*self._chance.choice(self._made))
                requests += 1
            memory.append(rss_mib())
        quarter = max(1, len(memory) // 4)
        before, after = (statistics.median(part) for part in (memory[:quarter], memory[-quarter:]))
        return {
            "evictions": counts.evictions - first,
            "asked": requests,
            "seconds": round(time.perf_counter() - began, 1),
            "rss_mib": memory,
            "first_quarter_mib": round(before, 1),
            "last_quarter_mib": round(after, 1),
            "bytes_each": round((after - before) * 2**20 / count, 1),
        }

    async def _seat(self, task: str, version: str) -> tuple[str, float]:
        """Take a seat and release it. Returns where the task was found, and the ms until the seat was ready."""
        resident, gets = self._residency.resident(task, version), self._counted.gets
        began = time.perf_counter()
        seat = await self._residency.acquire(task, version)
        ms = (time.perf_counter() - began) * 1e3
        self._residency.release(seat)
        return DEVICE if resident else HOST if self._counted.gets == gets else self.store, ms


def _tiers(times: SeatTimes) -> dict[str, Any]:
    whole = sum(map(len, times.ms.values()))
    return {
        tier: {"share": round(len(ms) / whole, 4), "count": len(ms), **_small(ms)}
        for tier, ms in sorted(times.ms.items(), key=lambda item: (item[0] != DEVICE, item[0] != HOST))
    }


def _small(values: Sequence[float]) -> dict[str, float | None]:
    """Percentiles in ms with the resolution that a seat on the device needs: microseconds."""
    percentiles = latencies([1e3 * ms for ms in values], (50, 99))
    return {name: None if us is None else round(us / 1e3, 4) for name, us in percentiles.items()}


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    options = report["options"]
    lines = [
        f"| {options['tasks']:,} tasks in a {report['store']} store, {report['resident']:,} resident | share | p50 ms "
        "| p99 ms | of |",
        "|---|---|---|---|---|",
    ]
    for tier, figures in report["tiers"].items():
        ms = f"{figures['p50_ms']:.3f} | {figures['p99_ms']:.3f}"
        lines.append(f"| {tier} | {figures['share']:.1%} | {ms} | {figures['count']:,} |")
    if (swaps := report["swaps"]) is not None:
        before, after = swaps["first_quarter_mib"], swaps["last_quarter_mib"]
        lines += [
            "",
            f"{swaps['evictions']:,} swaps in {swaps['seconds']:,} s: RSS {before:,} → {after:,} MiB "
            f"({swaps['bytes_each']} bytes each)",
        ]
    return "\n".join(lines)


def draw(report: Mapping[str, Any]) -> str:
    """SVG: where tasks were found, and memory over the swaps."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        axes = figure.add_subplot(1, 2, 1)
        tiers = report["tiers"]
        bars = axes.bar([*tiers], [100 * figures["share"] for figures in tiers.values()], color=LINES[: len(tiers)])
        axes.bar_label(bars, [f"{figures['p50_ms']:.2f} ms" for figures in tiers.values()], padding=2)
        axes.set(ylabel="% of requests", title="where a task was found, and the median time to its seat")
        axes.spines[["top", "right"]].set_visible(False)
        if (swaps := report["swaps"]) is not None:
            memory = figure.add_subplot(1, 2, 2)
            at = [swaps["evictions"] * place / (len(swaps["rss_mib"]) - 1) for place in range(len(swaps["rss_mib"]))]
            memory.plot(at, swaps["rss_mib"], color=OURS)
            memory.set(xlabel="swaps", ylabel="RSS, MiB", title="memory of the process", ylim=(0, None))
            memory.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench rack",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--redis", action="store_true", help="use a temporary redis-server instead of files")
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks in the store")
    parser.add_argument("--slots", type=int, default=1_000, help="slots of the rack")
    parser.add_argument("--cache-mib", type=float, default=80.0, help="host memory for decoded bundles")
    parser.add_argument("--method", default="vpt_deep", help="method of all tasks")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each layer")
    parser.add_argument(
        "--requests", type=int, default=20_000, help="requests by Zipf's law, after half as many for warm-up"
    )
    parser.add_argument("--swaps", type=int, default=0, help="evictions to run while memory is read")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
