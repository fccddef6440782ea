"""Merged metrics of several processes: a scrape of any front end shows all of them.

Each process writes its samples into a file of a shared folder every WRITE_S; the scraped process merges its current
samples with the others' files. Counters and histograms are summed. When a process ends, its counts are added to those
of all ended processes (`retire`), so no sum ever falls, and its gauges are dropped. Gauges merge by maximum, since most
are set by one process and 0 in the others; the exceptions are listed here: gauges that each engine sets are summed.
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
MINIMUM: Final = frozenset({"lensrack_engine_up", "process_start_time_seconds", "process_max_fds"})
OF_EACH_ENGINE: Final = ("queue_rows", "queue_places", "rack_lenses", "rack_slots", "rack_bytes", "cuda_graphs")
SUMMED: Final = frozenset(
    {"process_virtual_memory_bytes", "process_resident_memory_bytes", "process_open_fds"}
    | {f"lensrack_{name}" for name in OF_EACH_ENGINE}
)

Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and labels
Family = dict[str, Any]  # type, help, samples: [name, labels, value]


class ProcessMetrics:
    """The metrics of all processes of a server. `name`: this process's, such as `front-0-4711`."""

    def __init__(self, folder: Path, name: str, registry: CollectorRegistry = metrics.REGISTRY) -> None:
        self._folder, self._name, self._registry = folder, name, registry

    def write_snapshot(self) -> None:
        """Replace this process's file with its current samples."""
        _replace(self._folder / f"{self._name}{SUFFIX}", json.dumps(_snapshot(self._registry)))

    async def write_periodically(self) -> None:
        """Write a snapshot every WRITE_S, until cancelled."""
        while True:
            self.write_snapshot()
            await asyncio.sleep(WRITE_S)

    def collect(self) -> Iterator[Metric]:
        """The merged metrics; makes this object a collector of prometheus_client."""
        parts = [_snapshot(self._registry)]
        others = {file.name: _read(file) for file in self._folder.glob(f"*{SUFFIX}") if file.stem != self._name}
        # read after the other files: it contains the processes that ended meanwhile
        past = _read(self._folder / PAST) or {"ended": [], "families": {}}
        parts += [part for name, part in others.items() if part is not None and name not in past["ended"]]
        yield from _metrics(_merge([*parts, past["families"]]))

    def sample(self, process: str, name: str, **labels: str) -> float:
        """Return the value that another process has last written for a sample, 0 where there is none."""
        families: Mapping[str, Family] = _read(self._folder / f"{process}{SUFFIX}") or {}
        samples = (sample for family in families.values() for sample in family["samples"])
        return next((value for written, own, value in samples if (written, own) == (name, labels)), 0.0)

    def retire(self, name: str) -> None:
        """Fold an ended process's counts into the past and drop its gauges. Called by one process only."""
        file = self._folder / f"{name}{SUFFIX}"
        last = _read(file)
        if last is None:
            return
        past = _read(self._folder / PAST) or {"ended": [], "families": {}}
        counts = {key: family for key, family in last.items() if family["type"] != "gauge"}
        families = _limit_tasks(_merge([past["families"], counts]), metrics.TASKS.capacity)
        _replace(self._folder / PAST, json.dumps({"ended": [*past["ended"][-999:], file.name], "families": families}))
        file.unlink(missing_ok=True)


def merged_registry(process_metrics: ProcessMetrics) -> CollectorRegistry:
    """A registry of the merged metrics of all processes."""
    registry = CollectorRegistry()
    registry.register(process_metrics)
    return registry


def _snapshot(registry: CollectorRegistry) -> dict[str, Family]:
    return {
        family.name: {
            "type": family.type,
            "help": family.documentation,
            "samples": [[s.name, s.labels, s.value] for s in family.samples],
        }
        for family in registry.collect()
    }


def _merge(parts: Iterable[Mapping[str, Family]]) -> dict[str, Family]:
    families: dict[str, Family] = {}
    sums: dict[str, dict[Key, float]] = {}
    for part in parts:
        for name, family in part.items():
            families.setdefault(name, {"type": family["type"], "help": family["help"]})
            into = sums.setdefault(name, {})
            for sample, labels, value in family["samples"]:
                key = (sample, tuple(labels.items()))
                into[key] = _combine(name, family["type"], into[key], value) if key in into else value
    return {
        name: {**family, "samples": [[sample, dict(labels), value] for (sample, labels), value in sums[name].items()]}
        for name, family in families.items()
    }


def _combine(family: str, type_: str, a: float, b: float) -> float:
    if type_ != "gauge" or family in SUMMED:
        return a + b
    return min(a, b) if family in MINIMUM else max(a, b)


def _metrics(families: Mapping[str, Family]) -> Iterator[Metric]:
    for name, family in families.items():
        metric = Metric(name, family["help"], family["type"])
        for sample, labels, value in family["samples"]:
            metric.add_sample(sample, labels, value)
        yield metric


def _limit_tasks(families: Mapping[str, Family], most: int) -> dict[str, Family]:
    """Keep the series of the last `most` tasks, since in time every task has been among the busiest."""
    tasks = dict.fromkeys(
        labels["task"] for family in families.values() for _, labels, _ in family["samples"] if "task" in labels
    )
    kept = {None, "other", *list(tasks)[-most - 1 :]}
    return {
        name: {**family, "samples": [s for s in family["samples"] if s[1].get("task") in kept]}
        for name, family in families.items()
    }


def _read(file: Path) -> Any:
    """The file's JSON; None where the file is missing or damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.{os.getpid()}.new")
    new.write_text(text)
    new.replace(file)
