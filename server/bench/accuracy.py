"""`python -m server bench accuracy`: the accuracy of each method, and of a search among them, on folders of pictures.

A data folder holds train/ and test/ with a folder for each class. Every cell is the mean over the seeds; a seed draws
the validation pictures (a share of train/), the initial parameters and every order. The test pictures are used once,
after a fit; nothing is chosen by them. `auto` searches once, with the first seed, and its full fit is repeated for each
seed. Finished cells are kept in the output, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.methods.registry import SEARCHED, Registry
from server.training.co_batching import run_alone
from server.training.data import LabelledImages, Source, Splits, hold_out, read_pictures
from server.training.fit import FitResult, fitting
from server.training.recipe import Recipe, resolve
from server.training.search import searching

METHODS = SEARCHED
AUTO = "auto"
MAX_PIXELS = 50_000_000
Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if not options.render_only:
        torch.set_num_threads(options.threads)
        backbone = engine_backbone.load(options.backbone, weights=options.weights, dtype=options.dtype)
        for folder in options.data:
            _Bench(backbone, folder, options.seeds, options.budget, options.out).run()
    print(table(json.loads(file.read_text()) for file in sorted(options.out.glob("*.json"))))


class _Bench:
    """One data folder: its cells, kept in <out>/<name>.json."""

    def __init__(self, backbone: Backbone, folder: Path, seeds: Sequence[int], budget: int | None, out: Path) -> None:
        self._backbone, self._folder, self._seeds, self._budget = backbone, folder, seeds, budget
        self._file = out / f"{folder.name}.json"
        self._registry = Registry()
        self._cells: dict[str, Cell] = json.loads(self._file.read_text())["cells"] if self._file.exists() else {}

    def run(self) -> None:
        self._train, self._labels = read(self._folder / "train", self._backbone)
        self._test, _ = read(self._folder / "test", self._backbone)
        for seed in self._seeds:
            for name in METHODS:
                method = self._registry.get(name)
                recipe = resolve(method.defaults, {"seed": seed})
                self._cell(name, seed, lambda splits, name=name, recipe=recipe: self._fit(name, recipe, splits))  # type: ignore[misc]
            first = self._cells.get(f"{AUTO} {self._seeds[0]}")
            self._cell(AUTO, seed, self._search if first is None else self._refit(first, seed))

    def _cell(self, name: str, seed: int, fit: Callable[[Splits], FitResult]) -> None:
        key = f"{name} {seed}"
        if key in self._cells:
            return
        train, val = hold_out(self._train, Recipe().validation, seed)
        started, cpu = time.perf_counter(), time.process_time()
        fitted = fit(Splits(train, val, self._test))
        metrics = fitted.metrics
        self._cells[key] = {
            "fitted": fitted.method.name,
            "recipe": fitted.recipe.to_json(),
            "test_accuracy": metrics["test_accuracy"],
            "test_macro_accuracy": metrics["test"]["macro_accuracy"],
            "test_ece": metrics["test"]["ece"],
            "val_accuracy": metrics["val_accuracy"],
            "forward_passes": metrics["forward_passes"],
            "search": metrics.get("search"),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        print(f"{self._folder.name}: {key}: test accuracy {metrics['test_accuracy']:.3f}", flush=True)
        self._write()

    def _fit(self, name: str, recipe: Recipe, splits: Splits) -> FitResult:
        return run_alone(
            self._backbone, fitting(self._backbone, self._registry.get(name), splits, len(self._labels), recipe)
        )

    def _search(self, splits: Splits) -> FitResult:
        methods, seed = [self._registry.get(name) for name in METHODS], {"seed": self._seeds[0]}
        search = searching(self._backbone, methods, splits, len(self._labels), seed, budget=self._budget)
        return run_alone(self._backbone, search)

    def _refit(self, first: Cell, seed: int) -> Callable[[Splits], FitResult]:
        """The search's result, fitted with another seed."""
        recipe = Recipe(**{**first["recipe"], "seed": seed})
        return lambda splits: self._fit(first["fitted"], recipe, splits)

    def _write(self) -> None:
        results = {
            "data": self._folder.name,
            "classes": len(self._labels),
            "train": len(self._train),
            "test": len(self._test),
            "backbone": self._backbone.spec.arch,
            "fingerprint": self._backbone.spec.fingerprint,
            "dtype": str(self._backbone.dtype).removeprefix("torch."),
            "seeds": list(self._seeds),
            "budget": self._budget,
            "cells": self._cells,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(self._file)


def read(folder: Path, backbone: Backbone) -> tuple[LabelledImages, list[str]]:
    """The pictures of a folder of class folders, and the classes' names."""
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir())
    sources = [
        Source(file.read_bytes, number)
        for number, label in enumerate(labels)
        for file in sorted((folder / label).iterdir())
    ]
    return read_pictures(sources, backbone.spec.geometry, max_pixels=MAX_PIXELS), labels


def table(reports: Iterable[dict[str, Any]]) -> str:
    """Markdown, one row for each data folder and method."""
    rows = [
        "| data (classes, train / test) | method | test accuracy | forward passes | CPU s |",
        "|---|---|---|---|---|",
    ]
    for data in reports:
        title = f"{data['data']} ({data['classes']}, {data['train']} / {data['test']})"
        for name in (*METHODS, AUTO):
            cells = [cell for seed in data["seeds"] if (cell := data["cells"].get(f"{name} {seed}"))]
            if cells:
                rows.append(_row(title, name, cells))
                title = ""
    return "\n".join(rows)


def _row(title: str, name: str, cells: Sequence[Cell]) -> str:
    accuracies = [100 * cell["test_accuracy"] for cell in cells]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    search = cells[0]["search"]
    plain = cells[1:] if search and len(cells) > 1 else cells
    passes = f"{statistics.mean(cell['forward_passes'] for cell in plain):,.0f}"
    cpu = f"{statistics.mean(cell['cpu_seconds'] for cell in plain):,.0f}"
    if search:
        recipe = cells[0]["recipe"]
        summary = f"{recipe['optimizer']}, lr {recipe['lr']:g}, p {recipe['prompts']}, {recipe['epochs']} epochs"
        name = f"auto → {cells[0]['fitted']} ({summary})"
        passes = f"{search['forward_passes']:,} + {passes}"
        cpu = f"{cells[0]['cpu_seconds'] - float(cpu.replace(',', '')):,.0f} + {cpu}"
    return f"| {title} | {name} | {statistics.mean(accuracies):.1f}{spread} | {passes} | {cpu} |"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench accuracy", description=__doc__)
    parser.add_argument("data", type=Path, nargs="*", help="folders with train/ and test/ of class folders")
    parser.add_argument("--backbone", default="untrained", help="timm architecture, or `untrained`")
    parser.add_argument("--weights", type=Path, help="safetensors file of the backbone's weights")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; `auto` is float32 on a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, help="pictures through the backbone for a search")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/accuracy"), help="folder of the results")
    parser.add_argument("--render-only", action="store_true", help="print the table of what is in --out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
