"""`python -m server bench precision`: the cost of lower precision for the bundled tasks, on real pictures they never
saw.

The test pictures of `digits` and `faces` are answered by the bundled backbone in float32, in bfloat16 and with the
blocks' products in float8. Reported are accuracy, the difference of logits from float32's, in standard deviations of
these (root mean square and the largest), and the share of pictures with the same label. On a CPU float8 gives the same
numbers as on a GPU; times are not reported, because a CPU's say nothing about a GPU's. Needs scikit-learn and
scikit-image, which contain the pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from prompts_store import Bundle
from server.engine import bundled
from server.engine.backbone import Backbone, load_weights
from server.engine.engine import Engine
from server.engine.images import decode
from server.engine.rack import Rack, demand
from server.engine.residency import Loaded, Seat
from server.methods.registry import Registry

SIDE, HELD_BACK = 64, 4  # as in the tasks' fits: pictures enlarged once, every fourth of them kept for testing
BATCH = 16
PRECISIONS = ("float32", "bfloat16", "float8")


@dataclass(frozen=True)
class Row:
    """Figures of one task in one precision; drifts in standard deviations of float32's logits."""

    task: str
    precision: str
    pictures: int
    accuracy: float
    drift: float
    largest: float
    agree: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m server bench precision", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--pictures", type=int, default=450, help="most pictures of each task (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    options = parser.parse_args(arguments)
    rows = [row for task in ("digits", "faces") for row in measure(task, options.pictures)]
    print(f"torch {torch.__version__}\n\n{table(rows)}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def measure(task: str, most: int) -> list[Row]:
    """One row per precision."""
    bundle = Bundle.parse((bundled.FOLDER / "tasks" / f"{task}.safetensors").read_bytes())
    images, labels = pictures(task)
    targets = np.array([bundle.manifest.labels.index(label) for label in labels[:most]])
    logits: dict[str, NDArray[np.float64]] = {name: _logits(name, bundle, images[:most]) for name in PRECISIONS}
    truth = logits[PRECISIONS[0]]
    return [_row(task, name, values, truth, targets) for name, values in logits.items()]


def _row(
    task: str, name: str, logits: NDArray[np.float64], truth: NDArray[np.float64], targets: NDArray[np.int64]
) -> Row:
    chosen, difference = logits.argmax(1), np.abs(logits - truth) / truth.std()
    return Row(
        task,
        name,
        len(logits),
        float((chosen == targets).mean()),
        float(np.sqrt((difference**2).mean())),
        float(difference.max()),
        float((chosen == truth.argmax(1)).mean()),
    )


def pictures(task: str) -> tuple[list[Image.Image], list[str]]:
    """The test pictures of a bundled task, and their labels."""
    if task == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        arrays, labels = digits.images * (255 / 16), [str(target) for target in digits.target]
    else:
        from skimage.data import lfw_subset

        arrays = np.asarray(lfw_subset() * 255)  # type: ignore[no-untyped-call]
        labels = ["face" if index < len(arrays) // 2 else "other" for index in range(len(arrays))]
    kept = [Image.fromarray(image) for image in arrays[::HELD_BACK].round().astype(np.uint8)]
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB") for image in kept], labels[::HELD_BACK]


def _logits(precision: str, bundle: Bundle, images: Sequence[Image.Image]) -> NDArray[np.float64]:
    backbone = _backbone(precision)
    loaded = Registry().load(bundle, backbone)
    rack = Rack(
        dim=backbone.spec.dim, slots=1, vectors=demand(loaded.lens), device=backbone.device, dtype=backbone.dtype
    )
    engine, seat = Engine(backbone, rack), _seat(rack, loaded)
    cut = [decode.fit(picture, loaded.geometry) for picture in images]
    parts = [cut[start : start + BATCH] for start in range(0, len(cut), BATCH)]
    return np.stack([row for part in parts for row in engine.run([(pixels, seat) for pixels in part])])


def _backbone(precision: str) -> Backbone:
    arch, model = bundled.create()
    load_weights(model, bundled.WEIGHTS)
    float8 = precision == "float8"
    return Backbone.of(arch, model, dtype=torch.bfloat16 if float8 else getattr(torch, precision), float8=float8)


def _seat(rack: Rack, loaded: Loaded) -> Seat:
    place = rack.allocate(loaded.lens)
    rack.write(place, loaded.lens)
    return Seat("task", "0" * 64, place, loaded.labels, loaded.geometry, loaded.mean, loaded.std)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| task | | pictures | accuracy | drift / σ | largest / σ | same label |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.accuracy:.1%} | {row.drift:.1e} | {row.largest:.1e} | {row.agree:.1%}"
        lines.append(f"| {row.task} | {row.precision} | {row.pictures} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
