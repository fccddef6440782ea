"""`python -m server bench compare`: accuracy and cost of methods and baselines on folders of pictures, as a table and a
picture.

A data folder holds train/ and test/ with a folder for each class. Every fit uses the method's default recipe, except
for the options given here; a seed draws the validation pictures (a share of train/), the initial parameters and every
order. The test pictures are used once, after a fit; nothing is chosen by them. Finished fits are kept in the output, so
that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lensrack.picture import draw, markdown
from lensrack.wire import Comparison
from prompts_store import Backbone as Fingerprint
from prompts_store import Bundle, Manifest
from server import __version__
from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training.caches.feature_cache import FeatureCache
from server.training.co_batching import run_alone
from server.training.compare import SEEDS, ComparisonInputs, ComparisonRequest, comparing
from server.training.data import LabelledImages, Splits, hold_out, sample
from server.training.fit import FitResult
from server.training.frozen import FrozenFeatures
from server.training.progress import Progress
from server.training.recipe import Recipe
from server.worker.checkpoints import Checkpoints

from .accuracy import read

FEATURE_BYTES = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.data:
        torch.set_num_threads(options.threads)
        backbone = engine_backbone.load(options.backbone, weights=options.weights, dtype=options.dtype)
        for folder in options.data:
            compare(backbone, folder, options)
    comparisons = [Comparison.model_validate_json(file.read_text()) for file in sorted(options.out.glob("*.json"))]
    print("\n\n".join(f"{comparison.title}\n\n{markdown(comparison)}" for comparison in comparisons))
    if options.picture is not None:
        options.picture.write_text(draw(comparisons))


def compare(backbone: Backbone, folder: Path, options: argparse.Namespace) -> None:
    """Compare on one data folder; the result is kept in <out>/<name>.json."""
    file, registry = options.out / f"{folder.name}.json", Registry.installed()
    if file.exists():
        return
    train, labels = read(folder / "train", backbone)
    test, _ = read(folder / "test", backbone)
    train = sample(train, options.pictures, 0) if options.pictures else train
    fields = {"epochs": options.epochs, "batch_size": options.batch_size}
    methods = tuple(options.methods or registry.meanings)
    request = ComparisonRequest(methods, tuple(options.seeds), {name: value for name, value in fields.items() if value})
    cache = FeatureCache(options.out / "features", FEATURE_BYTES)
    inputs = ComparisonInputs(
        splits=lambda recipe: _split(train, test, recipe),
        labels=tuple(labels),
        bundle=lambda fitted: _bundle(backbone, fitted, labels),
        features=lambda: FrozenFeatures(backbone, cache),
    )
    checkpoints, started, cpu = Checkpoints(options.out / "checkpoints"), time.perf_counter(), time.process_time()
    result = run_alone(
        backbone,
        comparing(
            backbone,
            registry,
            request,
            inputs,
            on_progress=lambda progress: _show_progress(folder.name, progress),
            on_checkpoint=checkpoints.recorder(folder.name),
            resume=checkpoints.read(folder.name),
        ),
    )
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    title = {"title": f"{folder.name} ({len(labels)}, {len(train)} / {len(test)})", "task": folder.name, **result}
    _write(file, {**title, **{name: round(value, 1) for name, value in spent.items()}})
    checkpoints.forget(folder.name)


def _split(train: LabelledImages, test: LabelledImages, recipe: Recipe) -> Splits:
    return Splits(*hold_out(train, recipe.validation, recipe.seed), test)


def _bundle(backbone: Backbone, fitted: FitResult, labels: Sequence[str]) -> Bundle:
    spec = backbone.spec
    manifest = Manifest(
        task="compared",
        method=fitted.method.name,
        backbone=Fingerprint(arch=spec.arch, fingerprint=spec.fingerprint),
        labels=tuple(labels),
        prompt_lengths=fitted.prompt_lengths,
        preprocess=spec.preprocess,
        metrics=fitted.metrics,
        recipe=fitted.recipe.to_json(),
        dataset=None,
        parent=None,
        created_at=0.0,
        lensrack_version=__version__,
    )
    return Bundle.build(manifest, fitted.params)


def _show_progress(name: str, progress: Progress) -> None:
    if progress.trial_figures is not None:
        trial = progress.trial_figures
        accuracy = "diverged" if trial["test_accuracy"] is None else f"test accuracy {trial['test_accuracy']:.3f}"
        done = f"{progress.trial}/{progress.trials}"
        print(f"{name}: {done} {trial['method']} {trial['seed']}: {accuracy}, {trial['fit_s']} s", flush=True)


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(file)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench compare", description=__doc__)
    parser.add_argument("data", type=Path, nargs="*", help="folders with train/ and test/ of class folders")
    parser.add_argument("--methods", nargs="+", help="methods and baselines (default: all that can be served)")
    parser.add_argument("--backbone", default="untrained", help="timm architecture, or `untrained`")
    parser.add_argument("--weights", type=Path, help="safetensors file of the backbone's weights")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; `auto` is float32 on a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--epochs", type=int, help="epochs of every fit except heads alone (default: each method's own)"
    )
    parser.add_argument("--batch-size", type=int, help="default: each method's own")
    parser.add_argument(
        "--pictures", type=int, help="about how many pictures of train/ to use, with each class's share"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/compare"), help="folder of the results")
    parser.add_argument("--picture", type=Path, help="an SVG file to draw (needs matplotlib)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
