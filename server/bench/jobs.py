"""`python -m server bench jobs`: several training jobs one after the other, and in one mixed batch.

The jobs differ in pictures, seed and number of prompts. The two variants take turns, round after round; reported are
the medians as jobs per hour, their ratio, and the difference between the fitted parameters. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training import co_batching
from server.training.co_batching import Fitting
from server.training.data import InMemory, LabelledImages, Splits
from server.training.fit import FitResult, fitting
from server.training.recipe import resolve

CLASSES = 4


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    backbone = engine_backbone.load(options.backbone, weights=options.weights, device=options.device)
    load = Load(options.jobs, options.images, options.epochs, options.batch_size)
    report = measure(backbone, load, options.rounds)
    print(table(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1))


@dataclass(frozen=True)
class Load:
    """`jobs` jobs of `images` pictures each."""

    jobs: int
    images: int
    epochs: int
    batch_size: int


def measure(backbone: Backbone, load: Load, rounds: int) -> dict[str, Any]:
    """Wall and CPU times in seconds, one per round, and the difference between the two variants' parameters."""
    splits = [_splits(backbone, load.images, number) for number in range(load.jobs)]

    def begun() -> list[Fitting[FitResult]]:
        return [_job(backbone, split, number, load) for number, split in enumerate(splits)]

    ways: dict[str, Callable[[], list[FitResult]]] = {
        "one after the other": lambda: [co_batching.run_alone(backbone, job) for job in begun()],
        "in one batch": lambda: _all(co_batching.run(backbone, begun())),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    outcomes: dict[str, list[FitResult]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started, spent = time.perf_counter(), time.process_time()
            outcomes[name] = way()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - spent)
    return {
        "backbone": backbone.spec.arch,
        "device": backbone.device.type,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **asdict(load),
        "wall_s": wall,
        "cpu_s": cpu,
        "largest_difference": _difference(*outcomes.values()),
    }


def _job(backbone: Backbone, splits: Splits, number: int, load: Load) -> Fitting[FitResult]:
    method = Registry().get("vpt_deep")
    varied = {"seed": number, "prompts": 5 + 5 * (number % 4)}
    fields = {"epochs": load.epochs, "batch_size": load.batch_size, **varied}
    return fitting(backbone, method, splits, CLASSES, resolve(method.defaults, fields))


def _splits(backbone: Backbone, images: int, seed: int) -> Splits:
    """Noise around a colour for each class: the cost of a fit does not depend on the pictures."""
    generator, size = np.random.default_rng(seed), backbone.spec.image_size

    def pictures(count: int) -> LabelledImages:
        targets = np.arange(count) % CLASSES
        noise = generator.integers(0, 60, (count, size, size, 3))
        return LabelledImages(InMemory((noise + 45 * targets[:, None, None, None]).astype(np.uint8)), targets)

    return Splits(pictures(images), pictures(max(CLASSES, images // 6)), None)


def _all(outcomes: list[FitResult | Exception]) -> list[FitResult]:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, FitResult)]


def _difference(first: list[FitResult], second: list[FitResult]) -> float:
    """The largest difference of any parameter, relative to that parameter's largest value."""
    return max(
        float(np.abs(value - b.params[name]).max() / np.abs(value).max())
        for a, b in zip(first, second, strict=True)
        for name, value in a.params.items()
    )


def table(report: dict[str, Any]) -> str:
    wall = {name: statistics.median(times) for name, times in report["wall_s"].items()}
    cpu = {name: statistics.median(times) for name, times in report["cpu_s"].items()}
    base = next(iter(wall))
    rows = [
        f"{report['jobs']} jobs of {report['images']} pictures, {report['epochs']} epochs, batches of "
        f"{report['batch_size']}, {report['backbone']} in {report['dtype']} on {report['device']}",
        "",
        "| | jobs per hour | CPU s | against one after the other |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {3600 * report['jobs'] / wall[name]:,.0f} | {cpu[name]:.1f} | "
        f"{wall[base] / wall[name]:.2f}× by the clock, {cpu[base] / cpu[name]:.2f}× by CPU time |"
        for name in wall
    ]
    return "\n".join([*rows, "", f"largest difference of a parameter: {report['largest_difference']:.1e} of its range"])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench jobs", description=__doc__)
    parser.add_argument("--backbone", default="untrained", help="timm architecture, or `untrained`")
    parser.add_argument("--weights", type=Path, help="safetensors file of the backbone's weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
