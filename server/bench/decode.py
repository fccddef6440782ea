"""`python -m server bench decode`: JPEGs decoded at reduced size: the time saved, and the change of the logits.

Contact sheets of real pictures, as large as photographs, are decoded at full size and then as `LENSRACK_SCALED_DECODE`
does, for each margin, and cut to the backbone's input. Reported are CPU time per picture, its share of the full
decoding, the largest difference of a pixel, and of each logit of synthetic `vpt_deep` tasks in standard deviations of
the logits, with the share of pictures whose first label stays the same. One thread, variants in turns, medians. Nothing
is asserted.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from server.engine import backbone as engine_backbone
from server.engine import reference
from server.engine.backbone import Backbone
from server.engine.images import decode
from server.settings import Settings

from . import synthetic_tasks
from .engine import in_turns
from .figures import machine

MAX_PIXELS = 200_000_000
WHOLE = math.inf
Decoding = Callable[[bytes], decode.Pixels]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    settings = Settings()
    backbone = engine_backbone.load(settings.backbone, settings.backbone_weights, device="cpu", packed=False)
    with TemporaryDirectory(prefix="lensrack-bench-") as folder:
        photos = synthetic_tasks.pictures(options.pictures, Path(folder), options.sheets * 16)
        rows = [
            row for grid in options.grids for row in _of_size(sheets(photos, grid, options.sheets), backbone, options)
        ]
    stated = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {
        "benchmark": "decode",
        "machine": machine(),
        "backbone": backbone.spec.arch,
        "options": stated,
        "rows": rows,
    }
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def sheets(pictures: Sequence[Path], grid: int, count: int) -> list[bytes]:
    """`count` JPEGs of grid × grid pictures each: the detail of photographs at their size."""
    files = []
    for number in range(count):
        images = [Image.open(pictures[(number * 7 + place) % len(pictures)]) for place in range(grid * grid)]
        width, height = images[0].size
        sheet = Image.new("RGB", (grid * width, grid * height))
        for place, picture in enumerate(images):
            sheet.paste(picture.resize((width, height)), (place % grid * width, place // grid * height))
            picture.close()
        out = io.BytesIO()
        sheet.save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def _of_size(files: Sequence[bytes], backbone: Backbone, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per margin, full size first."""
    margins = [WHOLE, *options.margins]
    ways: dict[float, Decoding] = {margin: _decoding(backbone, margin) for margin in margins}
    spent = in_turns({str(margin): _all_of(way, files) for margin, way in ways.items()}, options.rounds)
    cut = {margin: np.stack([way(data) for data in files]) for margin, way in ways.items()}
    truth = _logits(backbone, cut[WHOLE], options)
    with Image.open(io.BytesIO(files[0])) as opened:
        size = f"{opened.width} × {opened.height}"
    rows = []
    for margin in margins:
        logits = _logits(backbone, cut[margin], options)
        rows.append(
            {
                "size": size,
                "margin": None if margin == WHOLE else margin,
                "cpu_ms": round(spent[str(margin)] / len(files), 2),
                "share": round(spent[str(margin)] / spent[str(WHOLE)], 2),
                "pixel": int(np.abs(cut[margin].astype(int) - cut[WHOLE]).max()),
                "drift": float(np.abs(logits - truth).max() / truth.std()),
                "median_drift": float(np.median(np.abs(logits - truth)) / truth.std()),
                "agree": float((logits.argmax(-1) == truth.argmax(-1)).mean()),
            }
        )
    return rows


def _decoding(backbone: Backbone, margin: float) -> Decoding:
    return lambda data: decode.pixels(data, backbone.spec.geometry, max_pixels=MAX_PIXELS, margin=margin)


def _all_of(way: Decoding, files: Sequence[bytes]) -> Callable[[], object]:
    return lambda: [way(data) for data in files]


@torch.inference_mode()
def _logits(backbone: Backbone, cut: np.ndarray[Any, Any], options: argparse.Namespace) -> np.ndarray[Any, Any]:
    """[tasks, pictures, classes], by the literal forward."""
    preprocess = backbone.spec.preprocess
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (preprocess.mean, preprocess.std))
    pixels = (torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 255 - mean) / std
    logits = []
    for seed, task in enumerate(synthetic_tasks.names(options.tasks)):
        bundle = synthetic_tasks.bundle(backbone.spec, task, "vpt_deep", 10, seed)
        params = {name: torch.tensor(value) for name, value in bundle.tensors.items()}
        logits.append(reference.vpt_deep(backbone, pixels, params, bundle.manifest.prompt_lengths).double().numpy())
    return np.stack(logits)


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| JPEG | margin | CPU ms | of whole | pixel off by | logit off by / σ, largest | median | same label |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        margin = "whole" if row["margin"] is None else f"{row['margin']:g}"
        lines.append(
            f"| {row['size']} | {margin} | {row['cpu_ms']:.1f} | {row['share']:.2f} | {row['pixel']} | "
            f"{row['drift']:.3f} | {row['median_drift']:.3f} | {row['agree']:.1%} |"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench decode",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pictures", type=Path, help="folder of pictures (default: drawn ones)")
    parser.add_argument("--sheets", type=int, default=16, help="JPEGs of each size")
    parser.add_argument("--grids", type=int, nargs="+", default=[4, 8, 16], help="pictures a side of a sheet")
    parser.add_argument("--margins", type=float, nargs="+", default=[1.0, 2.0], help="values of LENSRACK_SCALED_DECODE")
    parser.add_argument("--tasks", type=int, default=4, help="tasks whose logits are compared")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
