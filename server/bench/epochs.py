"""`python -m server bench epochs`: which epoch's parameters a fit should keep, on folders of pictures.

One fit for each data folder, method and seed, with the validation pictures evaluated after every epoch. From the same
fit come the parameters of its last epoch, of the epoch with the lowest validation loss, and of the one with the highest
validation accuracy (of equal ones the one with the lower loss). Each is evaluated once on the test pictures. A data
folder holds train/ and test/ with a folder for each class.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.methods.registry import SEARCHED, Registry
from server.training.checkpoint import Checkpoint
from server.training.co_batching import run_alone
from server.training.data import Splits, hold_out
from server.training.fit import fitting
from server.training.frozen import FrozenFeatures
from server.training.recipe import Recipe, resolve

from .accuracy import read

KEPT: Final = ("last", "lowest loss", "highest accuracy")


@dataclass
class _Kept:
    """The checkpoint of each rule in KEPT, so far."""

    states: dict[str, Checkpoint] = field(default_factory=dict)
    best: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def take(self, now: Checkpoint) -> None:
        accuracy, nll = now.curves["val_accuracy"][-1], now.curves["val_nll"][-1]
        ranks = zip(KEPT, ((float(now.epoch),), (-nll,), (accuracy, -nll)), strict=True)
        for rule, rank in ranks:
            if rank >= self.best.get(rule, rank):
                self.best[rule] = rank
                params = {name: value.detach().clone() for name, value in now.params.items()}
                self.states[rule] = replace(now, params=params, optimizer={}, curves={**now.curves})


def measure(backbone: Backbone, method_name: str, splits: Splits, labels: int, recipe: Recipe) -> dict[str, float]:
    """The test accuracy of the parameters that each rule keeps, in per cent, and how far the last epoch's validation
    accuracy is below that of the best epoch."""
    method, kept, frozen = Registry().get(method_name), _Kept(), FrozenFeatures(backbone)
    validated = Splits(splits.train, splits.val, None)
    run_alone(backbone, fitting(backbone, method, validated, labels, recipe, on_checkpoint=kept.take, frozen=frozen))
    figures = {}
    for rule, state in kept.states.items():  # with all epochs done, a resumed fit only evaluates
        resume = replace(state, epoch=recipe.epochs)
        done = run_alone(backbone, fitting(backbone, method, splits, labels, recipe, resume=resume, frozen=frozen))
        figures[rule] = 100 * done.metrics["test_accuracy"]
    accuracies = kept.states["last"].curves["val_accuracy"]
    return {**figures, "drop": 100 * (max(accuracies) - accuracies[-1])}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    backbone = engine_backbone.load(options.backbone, weights=options.weights, dtype=options.dtype)
    print(f"| data | method | fits | {' | '.join(KEPT)} | last below best, validation | CPU s |")
    print("|---|---|---|" + "---|" * (len(KEPT) + 2))
    for folder in options.data:
        train, labels = read(folder / "train", backbone)
        test, _ = read(folder / "test", backbone)
        for name in options.methods:
            cpu, fits = time.process_time(), []
            for seed in options.seeds:
                recipe = resolve(Registry().get(name).defaults, {"seed": seed, "epochs": options.epochs})
                held = Splits(*hold_out(train, recipe.validation, seed), test)
                fits.append(measure(backbone, name, held, len(labels), recipe))
            cells = " | ".join(_spread([fit[rule] for fit in fits]) for rule in KEPT)
            drops = f"{statistics.mean(fit['drop'] for fit in fits):.1f}, at most {max(f['drop'] for f in fits):.1f}"
            print(
                f"| {folder.name} | `{name}` | {len(fits)} | {cells} | {drops} | {time.process_time() - cpu:,.0f} |",
                flush=True,
            )


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench epochs", description=__doc__)
    parser.add_argument("data", type=Path, nargs="+", help="folders with train/ and test/ of class folders")
    parser.add_argument("--backbone", default="untrained", help="timm architecture, or `untrained`")
    parser.add_argument("--weights", type=Path, help="safetensors file of the backbone's weights")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; `auto` is float32 on a CPU")
    parser.add_argument("--methods", nargs="+", default=list(SEARCHED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every fit; default: the method's own")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)
