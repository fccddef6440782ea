"""`python -m server bench prompts`: accuracy with prompts initialised from tokens, and with fewer prompts.

A data folder holds train/ and test/ with a folder for each class. One fit for every `--inits` and seed. With `--keep`,
the first fit of each seed is then condensed to each of these shares of its prompts, to all of them, regardless of the
first that is good enough. The test pictures are used once, after a fit; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training.co_batching import Fitting, run_alone
from server.training.condense import counts, cut, refit_recipe, scores
from server.training.data import Splits, hold_out
from server.training.fit import Fit, FitResult, fit, fitting
from server.training.frozen import FrozenFeatures
from server.training.recipe import Condense, Recipe, resolve

from .accuracy import read


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    backbone = engine_backbone.load(options.backbone, weights=options.weights, dtype=options.dtype)
    method = Registry().get(options.method)
    train, labels = read(options.data / "train", backbone)
    test, _ = read(options.data / "test", backbone)
    fields = {"epochs": options.epochs, "prompts": options.prompts}
    for seed in options.seeds:
        splits = Splits(*hold_out(train, Recipe().validation, seed), test)
        for init in options.inits:
            recipe = resolve(method.defaults, {**fields, "seed": seed, "init": init})
            began = time.process_time()
            fitted = fit(backbone, method, splits, len(labels), recipe)
            what = {"data": options.data.name, "seed": seed, "init": init, "prompts": sum(fitted.prompt_lengths)}
            _tell(options.out, what, fitted.metrics, began)
            if options.keep and init == options.inits[0]:
                _condense(backbone, fitted, splits, len(labels), options=options, what=what)


def _condense(
    backbone: Backbone,
    parent: FitResult,
    splits: Splits,
    labels: int,
    *,
    options: argparse.Namespace,
    what: dict[str, Any],
) -> None:
    """Condense to every share, with the steps that a job takes until one is good enough."""
    began, frozen = time.process_time(), FrozenFeatures(backbone)
    condense = Condense(keep=tuple(options.keep), epochs=options.refit_epochs)
    recipe = refit_recipe(replace(parent.recipe, condense=condense))

    def scored() -> Fitting[Tensor]:
        run = Fit(backbone, parent.method, recipe, parent.prompt_lengths, frozen)
        yield from run.begin(splits.train, labels, parent, None)
        return (yield from scores(run, (yield from run.inputs(splits.train))))

    score = run_alone(backbone, scored())
    print(f"scores after {time.process_time() - began:.1f} CPU s", flush=True)
    for count in counts(sum(parent.prompt_lengths), condense.keep):
        began, start = time.process_time(), cut(parent, score, count)
        again = fitting(backbone, start.method, splits, labels, recipe, start=start, frozen=frozen, each_epoch=False)
        fitted = run_alone(backbone, again)
        kept = {"kept": count, "prompt_lengths": start.prompt_lengths, "epochs": recipe.epochs}
        _tell(options.out, {**what, **kept}, fitted.metrics, began)


def _tell(out: Path, what: dict[str, Any], metrics: dict[str, Any], began: float) -> None:
    row = {
        **what,
        "val_accuracy": metrics["val_accuracy"],
        "val_nll": metrics["val"]["nll"],
        "test_accuracy": metrics["test_accuracy"],
        "cpu_s": round(time.process_time() - began, 1),
        "loss": metrics["curve"]["loss"],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "loss"}), flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench prompts", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ of class folders")
    parser.add_argument("--backbone", default="untrained", help="timm architecture, or `untrained`")
    parser.add_argument("--weights", type=Path, help="safetensors file of the backbone's weights")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; `auto` is float32 on a CPU")
    parser.add_argument("--method", default="vpt_deep")
    parser.add_argument("--inits", nargs="+", default=["uniform", "tokens", "tokens_mean", "tokens_kmeans"])
    parser.add_argument("--prompts", type=int, help="prompts of a layer")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--keep", type=float, nargs="*", default=[], help="shares of the prompts to condense to")
    parser.add_argument("--refit-epochs", type=int, help="default: three fifths of the fit's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/prompts.jsonl"), help="one JSON line for each fit")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
