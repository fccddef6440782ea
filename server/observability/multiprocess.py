"""One set of metrics for several processes: what a scrape of any front end tells.

Each process writes its own samples into a file of a folder they share, every WRITE_S; who is scraped adds its own, of
this moment, to what the others' files say. Counters and histograms are sums. When a process has ended, its counts are
added to those of all who ended before it (`retire`), so no sum ever falls; its gauges go with it. A gauge of several
processes is the largest, as most are fed by one of them and 0 in the others; the exceptions are named here: among them
what each of several engines has of its own, which is 0 in a process without one.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Metric

from . import metrics

WRITE_S: Final = 2.0
SUFFIX: Final = ".metrics"
PAST: Final = "past.json"
LEAST: Final = frozenset({"lensrack_engine_up", "process_start_time_seconds", "process_max_fds"})
OF_EACH_ENGINE: Final = ("queue_rows", "queue_places", "rack_lenses", "rack_slots", "rack_bytes", "cuda_graphs")
SUMMED: Final = frozenset(
    {"process_virtual_memory_bytes", "process_resident_memory_bytes", "process_open_fds"}
    | {f"lensrack_{name}" for name in OF_EACH_ENGINE}
)

Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and labels
Family = dict[str, Any]  # type, help, samples: [name, labels, value]


class ProcessMetrics:
    """The metrics of all processes of a server. `own`: this process's name among them, such as `front-0-4711`."""

    def __init__(self, folder: Path, own: str, registry: CollectorRegistry = metrics.REGISTRY) -> None:
        self._folder, self._own, self._registry = folder, own, registry

    def write(self) -> None:
        _replace(self._folder / f"{self._own}{SUFFIX}", json.dumps(_snapshot(self._registry)))

    async def keep_writing(self) -> None:
        while True:
            self.write()
            await asyncio.sleep(WRITE_S)

    def collect(self) -> Iterator[Metric]:
        """As a registry's collector."""
        parts = [_snapshot(self._registry)]
        others = {file.name: _read(file) for file in self._folder.glob(f"*{SUFFIX}") if file.stem != self._own}
        past = _read(self._folder / PAST) or {"ended": [], "families": {}}  # read last: who ended meanwhile is in it
        parts += [part for name, part in others.items() if part is not None and name not in past["ended"]]
        yield from _metrics(_merged([*parts, past["families"]]))

    def retire(self, name: str) -> None:
        """Its process has ended: its counts stay, its gauges go. Called by one process only."""
        file = self._folder / f"{name}{SUFFIX}"
        last = _read(file)
        if last is None:
            return
        past = _read(self._folder / PAST) or {"ended": [], "families": {}}
        counts = {family: found for family, found in last.items() if found["type"] != "gauge"}
        families = _of_few_tasks(_merged([past["families"], counts]), metrics.TASKS.most)
        _replace(self._folder / PAST, json.dumps({"ended": [*past["ended"][-999:], file.name], "families": families}))
        file.unlink(missing_ok=True)


def merged_registry(ledger: ProcessMetrics) -> CollectorRegistry:
    """A registry that gives what all processes have counted."""
    registry = CollectorRegistry()
    registry.register(ledger)
    return registry


def _snapshot(registry: CollectorRegistry) -> dict[str, Family]:
    return {
        family.name: {
            "type": family.type,
            "help": family.documentation,
            "samples": [[one.name, one.labels, one.value] for one in family.samples],
        }
        for family in registry.collect()
    }


def _merged(parts: Iterable[Mapping[str, Family]]) -> dict[str, Family]:
    families: dict[str, Family] = {}
    sums: dict[str, dict[Key, float]] = {}
    for part in parts:
        for name, family in part.items():
            families.setdefault(name, {"type": family["type"], "help": family["help"]})
            into = sums.setdefault(name, {})
            for sample, labels, value in family["samples"]:
                key = (sample, tuple(labels.items()))
                into[key] = _combined(name, family["type"], into[key], value) if key in into else value
    return {
        name: {**family, "samples": [[sample, dict(labels), value] for (sample, labels), value in sums[name].items()]}
        for name, family in families.items()
    }


def _combined(family: str, type_: str, one: float, other: float) -> float:
    if type_ != "gauge" or family in SUMMED:
        return one + other
    return min(one, other) if family in LEAST else max(one, other)


def _metrics(families: Mapping[str, Family]) -> Iterator[Metric]:
    for name, family in families.items():
        metric = Metric(name, family["help"], family["type"])
        for sample, labels, value in family["samples"]:
            metric.add_sample(sample, labels, value)
        yield metric


def _of_few_tasks(families: Mapping[str, Family], most: int) -> dict[str, Family]:
    """Of tasks no more than have a label of their own: over the years every task has been among the busiest."""
    tasks = dict.fromkeys(
        labels["task"] for family in families.values() for _, labels, _ in family["samples"] if "task" in labels
    )
    kept = {None, "other", *list(tasks)[-most - 1 :]}
    return {
        name: {**family, "samples": [one for one in family["samples"] if one[1].get("task") in kept]}
        for name, family in families.items()
    }


def _read(file: Path) -> Any:
    """None where there is nothing, or what is there is no JSON."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.write_text(text)
    new.replace(file)
