"""`python -m server bench backbone`: the quality of backbones, compared.

Each backbone answers every data set twice: with a head on its frozen feature (`linear`, its recipe searched) and with
prompts at every layer (`vpt_deep`, one default recipe for all). Figures are test accuracies, averaged over the seeds; a
seed draws the validation pictures and the initial parameters. The first `--backbone` is the floor and the last the
ceiling: for those between them the table gives the share of the distance from floor to ceiling that they reach.
Finished cells are kept in --out, so that an interrupted run continues.

A data set is a folder with train/ and test/ of class folders, or an npz file like MedMNIST's.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from server.engine import backbone as engine_backbone
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training.co_batching import run_alone
from server.training.data import LabelledImages, Source, Splits, hold_out, read_pictures, sample
from server.training.fit import FitResult, fitting
from server.training.recipe import Recipe, resolve
from server.training.search import searching

from .accuracy import MAX_PIXELS, read

RANDOM = "random"
RANDOM_ARCH = "vit_tiny_patch16_224"
METHODS = ("linear", "vpt_deep")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    names = [backbone.split("=")[0] for backbone in options.backbone]
    if not options.render_only:
        torch.set_num_threads(options.threads)
        options.out.mkdir(parents=True, exist_ok=True)
        for backbone in options.backbone:
            name, _, weights = backbone.partition("=")
            _measure(name, _load(name, weights, options.dtype), options)
    print(table(options.out, names, [path.stem for path in options.data], options.seeds))


def _load(name: str, weights: str, dtype: str) -> Backbone:
    if name != RANDOM:
        return engine_backbone.load(name, Path(weights) if weights else None, dtype=dtype)
    torch.manual_seed(0)
    model = timm.create_model(RANDOM_ARCH, num_classes=0)
    return Backbone.of(RANDOM, model, trained=False, dtype=getattr(torch, dtype.replace("auto", "float32")))


def _measure(name: str, backbone: Backbone, options: argparse.Namespace) -> None:
    for path in options.data:
        splits = None
        for seed in options.seeds:
            for method in METHODS:
                file = options.out / f"{name}-{path.stem}-{method}-{seed}.json"
                if file.exists():
                    continue
                splits = splits or _splits(path, backbone, options.most)
                started = time.process_time()
                train, val = hold_out(splits[0], Recipe().validation, seed)
                fields = {"seed": seed} if method == "linear" else {"seed": seed, "epochs": options.epochs}
                fitted = _fit(backbone, method, Splits(train, val, splits[1]), splits[2], fields)
                cell = {
                    "fingerprint": backbone.spec.fingerprint,
                    "dtype": str(backbone.dtype).removeprefix("torch."),
                    "train": len(splits[0]),
                    "test": len(splits[1]),
                    "classes": splits[2],
                    "recipe": fitted.recipe.to_json(),
                    "test_accuracy": fitted.metrics["test_accuracy"],
                    "cpu_seconds": round(time.process_time() - started, 1),
                }
                file.write_text(json.dumps(cell, indent=1))
                print(f"{file.stem}: {cell['test_accuracy']:.3f}, {cell['cpu_seconds']} s", flush=True)


def _fit(backbone: Backbone, name: str, splits: Splits, classes: int, fields: dict[str, Any]) -> FitResult:
    """A head's recipe is searched, which costs only the features; prompts use their default recipe."""
    method = Registry().get(name)
    if name == "linear":
        return run_alone(backbone, searching(backbone, [method], splits, classes, fields))
    recipe = resolve(method.defaults, fields)
    return run_alone(backbone, fitting(backbone, method, splits, classes, recipe))


def _splits(path: Path, backbone: Backbone, most: int) -> tuple[LabelledImages, LabelledImages, int]:
    """Train, test and the number of classes; about `most` training pictures, with each class's share."""
    if path.is_dir():
        (train, labels), (test, _) = (read(path / part, backbone) for part in ("train", "test"))
        classes = len(labels)
    else:
        with np.load(path, allow_pickle=False) as arrays:
            train, test = (_of_arrays(arrays, part, backbone) for part in ("train", "test"))
        classes = int(max(train.targets.max(), test.targets.max())) + 1
    return sample(train, most, seed=0), test, classes


def _of_arrays(arrays: np.lib.npyio.NpzFile, part: str, backbone: Backbone) -> LabelledImages:
    images, targets = arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1)
    sources = [Source(partial(_png, image), int(target)) for image, target in zip(images, targets, strict=True)]
    return read_pictures(sources, backbone.spec.geometry, max_pixels=MAX_PIXELS)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def table(out: Path, backbones: Sequence[str], data: Sequence[str], seeds: Iterable[int]) -> str:
    """Markdown: a row for each data set and method, a column for each backbone, and the means."""
    rows = ["| data | method | " + " | ".join(backbones) + " |", "|---|---|" + "---|" * len(backbones)]
    means: dict[str, list[float]] = {backbone: [] for backbone in backbones}
    for name in data:
        for method in METHODS:
            accuracies = {backbone: _accuracies(out, backbone, name, method, seeds) for backbone in backbones}
            rows.append(f"| {name} | `{method}` | " + " | ".join(map(_cell, accuracies.values())) + " |")
            for backbone, values in accuracies.items():
                if values:
                    means[backbone].append(statistics.mean(values))
    whole = len(data) * len(METHODS)
    mean = {backbone: statistics.mean(values) if len(values) == whole else None for backbone, values in means.items()}
    rows.append(
        "| **mean** | | "
        + " | ".join("–" if values is None else f"**{values:.1f}**" for values in mean.values())
        + " |"
    )
    floor, ceiling = mean[backbones[0]], mean[backbones[-1]]
    if floor is not None and ceiling is not None and floor != ceiling:
        shares = ["–" if values is None else f"{(values - floor) / (ceiling - floor):.0%}" for values in mean.values()]
        rows.append(f"| share of the way from {backbones[0]} to {backbones[-1]} | | " + " | ".join(shares) + " |")
    return "\n".join(rows)


def _accuracies(out: Path, backbone: str, data: str, method: str, seeds: Iterable[int]) -> list[float]:
    files = (out / f"{backbone}-{data}-{method}-{seed}.json" for seed in seeds)
    return [100 * json.loads(file.read_text())["test_accuracy"] for file in files if file.exists()]


def _cell(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "–"
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.1f}{spread}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench backbone", description=__doc__)
    parser.add_argument("data", type=Path, nargs="+", help="folders with train/ and test/, or npz files")
    parser.add_argument(
        "--backbone",
        action="append",
        required=True,
        help="`random`, `bundled`, or a timm architecture=FILE; repeatable",
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16; `auto` is float32 on a CPU")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of vpt_deep fits")
    parser.add_argument("--most", type=int, default=1_000, help="most training pictures of a data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/backbone"), help="folder of the results")
    parser.add_argument("--render-only", action="store_true", help="print the table of what is in --out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
