"""`python -m server bench train`: forward and backward of a training step, ours compared with the papers' formulation.

`vpt_deep` on one batch of pictures, for each number of prompts: the literal forward, in which prompts are tokens and
pass through every block, and ours, in which they are keys and values; in float32, with packed weights, and in bfloat16
if the machine supports it. One CPU thread, CPU time, variants in turns, medians; without the optimiser, which is the
same for all. Memory is what one step takes in a separate process beyond the memory before it. Next to them is the
difference of the prompts' gradient from the literal one, relative to its norm. Weights are random unless a file is
given: times do not depend on them. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine import reference, vit
from server.engine.backbone import Backbone, load_weights
from server.engine.lens import condition
from server.engine.packed import can_pack
from server.methods.vpt_deep import VptDeep

from . import reporting
from .engine import in_turns
from .process_tree import peak_rss_mib, rss_mib
from .svg import LINES, as_svg, style

METHOD = VptDeep()
CLASSES = 10
LITERAL = "literal float32"
KINDS = {
    LITERAL: (torch.float32, False),
    "lensrack plain float32": (torch.float32, False),
    "lensrack packed float32": (torch.float32, True),
    "lensrack packed bfloat16": (torch.bfloat16, True),
}
Step = Callable[[], Tensor]  # runs a forward and a backward; returns the prompts' gradient


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    if options.peak_of is not None:
        print(json.dumps(_peak_mib(options)))
        return
    report = measure(options)
    reporting.emit(report, table(report), options, draw)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for prompts in options.prompts:
        steps = {name: step(name, prompts, options) for name in _kinds(options)}
        spent = in_turns(dict(steps), options.rounds)
        literal = steps[LITERAL]()
        for name, once in steps.items():
            rows.append(
                {
                    "prompts": prompts,
                    "name": name,
                    "cpu_ms": spent[name],
                    "images_per_cpu_s": round(options.batch / spent[name] * 1e3, 2),
                    "ratio": round(spent[LITERAL] / spent[name], 2),
                    "peak_mib": _measured_peak(name, prompts, options),
                    "gradient_off": float((once() - literal).norm() / literal.norm()),
                }
            )
    header = reporting.provenance(
        "train", options, dtype="as the rows say", seeds=f"{options.seed}, of pictures and parameters"
    )
    return {**header, "rows": rows}


def _kinds(options: argparse.Namespace) -> list[str]:
    """The literal variant, and the selected ones that run on this machine."""
    here = [name for name, (dtype, packed) in KINDS.items() if not packed or can_pack(torch.device("cpu"), dtype)]
    return [name for name in here if name == LITERAL or name in options.kinds]


def step(name: str, prompts: int, options: argparse.Namespace) -> Step:
    """A training step of this kind, always on the same pictures and with the same parameters."""
    dtype, packed = KINDS[name]
    torch.manual_seed(options.seed)
    model = timm.create_model(options.arch, num_classes=0)
    if options.weights is not None:
        load_weights(model, options.weights)
    backbone = Backbone.of(options.arch, model, dtype=dtype, packed=packed)
    size, lengths = backbone.spec.image_size, METHOD.prompt_lengths(backbone.spec, prompts)
    chance = torch.Generator().manual_seed(options.seed)
    pixels = torch.randn(options.batch, 3, size, size, generator=chance).to(dtype)
    params = METHOD.init(backbone.spec, lengths, CLASSES, chance)
    params["head.weight"] = torch.randn(params["head.weight"].shape, generator=chance)
    params = {key: value.requires_grad_(True) for key, value in params.items()}
    targets = torch.arange(options.batch) % CLASSES

    def literal() -> Tensor:
        return reference.vpt_deep(backbone, pixels, params, lengths)

    def ours() -> Tensor:
        lens = METHOD.lower(backbone, {key: value.to(dtype) for key, value in params.items()}, lengths)
        features = vit.forward(backbone, vit.embed(backbone, pixels), condition(lens, len(pixels)))
        return vit.classify(features, lens).float()

    logits = literal if name == LITERAL else ours

    def once() -> Tensor:
        for value in params.values():
            value.grad = None
        F.cross_entropy(logits(), targets).backward()
        gradient = params["prompts"].grad
        assert gradient is not None, "the prompts are trained"
        return gradient

    return once


# --- memory -----------------------------------------------------------------------------------------------------------


def _measured_peak(name: str, prompts: int, options: argparse.Namespace) -> float:
    """Peak memory, measured in a separate process, because a peak never falls."""
    arguments = ["--peak-of", name, "--prompts", str(prompts), "--batch", str(options.batch), "--arch", options.arch]
    command = [sys.executable, "-m", "server.bench.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"memory could not be measured:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout))


def _peak_mib(options: argparse.Namespace) -> float:
    [prompts] = options.prompts
    once = step(options.peak_of, prompts, options)
    before = rss_mib()
    once()
    return round(peak_rss_mib() - before, 1)


# --- the report -------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    options = report["options"]
    lines = [
        f"| {options['arch']}, batches of {options['batch']} | prompts | CPU ms | images / CPU s | × literal "
        "| peak MiB | gradient off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['name']} | {row['prompts']} | {row['cpu_ms']:,.0f} | {row['images_per_cpu_s']:.1f} | "
            f"{row['ratio']:.2f} | {row['peak_mib']:,.0f} | {row['gradient_off']:.0e} |"
        )
    return "\n".join(lines)


def draw(report: Mapping[str, Any]) -> str:
    """SVG: images a second and memory, a group of bars for each number of prompts."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    counts = list(dict.fromkeys(row["prompts"] for row in rows))
    with style():
        figure = Figure(figsize=(7.5, 3.0), layout="constrained")
        for place, (what, label) in enumerate((("images_per_cpu_s", "images / CPU s"), ("peak_mib", "MiB of a step"))):
            axes, width = figure.add_subplot(1, 2, place + 1), 0.8 / len(names)
            for number, name in enumerate(names):
                heights = [row[what] for row in rows if row["name"] == name]
                at = [group + (number - (len(names) - 1) / 2) * width for group in range(len(counts))]
                axes.bar(at, heights, width * 0.95, label=name, color=LINES[::-1][number + 1])
            axes.set_xticks(range(len(counts)), [f"{count} prompts" for count in counts])
            axes.set(ylabel=label)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        return as_svg(figure)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server bench train",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", default="deit_tiny_patch16_224", help="a plain timm ViT")
    parser.add_argument("--weights", type=Path, help="safetensors of its weights (default: random)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 50, 100], help="prompts of each layer")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a step")
    parser.add_argument(
        "--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], help="variants besides the literal one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures and parameters")
    parser.add_argument("--peak-of", choices=[*KINDS], help="only the memory of one variant, as JSON")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
