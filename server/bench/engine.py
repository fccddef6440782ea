"""`python -m server bench engine`: the gain from packed weights and bfloat16 on one CPU thread, and the cost of
methods.

CPU time, not wall time, so that other load on the machine matters as little as possible; the variants take turns, round
after round, and the medians are reported with their ratio to the plain timm model. Weights are random: times do not
depend on them. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.images.decode import Geometry
from server.engine.lens import Lens, Plain, condition
from server.engine.packed import PackedLinear, can_pack
from server.engine.rack import Rack, demand
from server.engine.residency import Seat
from server.methods.method import Method, Params
from server.methods.registry import METHODS
from server.methods.vpt_deep import VptDeep

from . import reporting
from .svg import Panel, bars

ARCHS = ("deit_tiny_patch16_224", "vit_base_patch16_224")
METHOD = VptDeep()
CLASSES = 10
KINDS = {
    "plain float32": (torch.float32, False),
    "packed float32": (torch.float32, True),
    "packed bfloat16": (torch.bfloat16, True),
}
Variants = dict[str, Callable[[], object]]


class Packed(nn.Module):
    """A packed product in place of timm's linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._product = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    reports = []
    for arch in options.arch:
        reports.append(measure(arch, options))
    header = reporting.provenance("engine", options, dtype="as the rows say", seeds="0, and of each task its number")
    tables = "\n\n".join(table(report) for report in reports)
    reporting.emit({**header, "archs": reports}, tables, options, draw)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench engine", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="plain timm ViTs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every variant (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=8, help="rows of a batch, each of its own task")
    parser.add_argument("--train-batch", type=int, default=32, help="pictures of a training step")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer")
    parser.add_argument("--residents", type=int, default=1000, help="tasks on the rack (default: %(default)s)")
    reporting.add_file_options(parser)
    return parser.parse_args(arguments)


def measure(arch: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one architecture: medians in milliseconds of CPU time."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=0)
    backbones = {
        name: Backbone.of(arch, copy.deepcopy(model), dtype=dtype, packed=packed)
        for name, (dtype, packed) in KINDS.items()
        if not packed or can_pack(torch.device("cpu"), dtype)
    }
    size = backbones["plain float32"].spec.image_size
    serving = torch.randn(options.tasks, 3, size, size)
    training = torch.randn(options.train_batch, 3, size, size)
    forward = _timm_variants(model, serving) | {
        f"lensrack {name}, {options.tasks} tasks": _served(backbone, serving, options)
        for name, backbone in backbones.items()
    }
    by_method = _by_method(backbones.get("packed float32", backbones["plain float32"]), serving, options)
    residents = _by_residents(backbones.get("packed float32", backbones["plain float32"]), serving, options)
    heads = _by_heads(backbones.get("packed float32", backbones["plain float32"]), serving, options)
    step = {f"lensrack {name}": _fitted(backbone, training, options) for name, backbone in backbones.items()}
    return {
        "arch": arch,
        "torch": torch.__version__,
        "block_weight_bytes": sum(p.numel() * p.element_size() for p in model.blocks.parameters()),
        f"forward of {options.tasks} pictures": in_turns(forward, options.rounds),
        f"forward of {options.tasks} pictures, a task each, by method": in_turns(by_method, options.rounds),
        f"forward of {options.tasks} pictures, tasks drawn from those on the rack": in_turns(residents, options.rounds),
        "one picture for many tasks of which each is a head": in_turns(heads, options.rounds),
        f"training step of {options.train_batch} pictures": in_turns(step, options.rounds),
    }


def in_turns(variants: Variants, rounds: int) -> dict[str, float]:
    """Median CPU time of each variant in ms. One turn beforehand pays for set-up."""
    return {name: cpu_ms for name, (cpu_ms, _) in by_both_clocks(variants, rounds).items()}


def by_both_clocks(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """As `in_turns`, followed by the median wall time, which includes other load on the machine."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            started = time.process_time(), time.perf_counter()
            run()
            if turn:
                spent[name].append((time.process_time() - started[0], time.perf_counter() - started[1]))
    return {name: (_median_ms(times, 0), _median_ms(times, 1)) for name, times in spent.items()}


def _median_ms(spent: Sequence[tuple[float, float]], clock: int) -> float:
    return round(statistics.median(seconds[clock] for seconds in spent) * 1e3, 2)


def table(report: dict[str, Any]) -> str:
    """Markdown: times, and the speed relative to the first row of each group."""
    tables = []
    for group, times in _groups(report).items():
        first = next(iter(times.values()))
        lines = [f"| {report['arch']}: {group} | CPU ms | × the first |", "|---|---|---|"]
        tables.append("\n".join(lines + [f"| {name} | {ms:,.1f} | {first / ms:.2f} |" for name, ms in times.items()]))
    return "\n\n".join(tables)


def draw(report: Mapping[str, Any]) -> str:
    """SVG: a panel for each group of each architecture."""
    panels = [
        Panel(f"{arch['arch']}: {group}", "CPU ms", times, ours=[name for name in times if not name.startswith("timm")])
        for arch in report["archs"]
        for group, times in _groups(arch).items()
    ]
    return bars(panels)


def _groups(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {group: times for group, times in report.items() if isinstance(times, dict)}


def _timm_variants(model: VisionTransformer, pixels: Tensor) -> Variants:
    """timm's own forward for one task, unchanged and with its blocks' products packed."""
    variants = {"timm float32, 1 task": (copy.deepcopy(model), pixels)}
    for dtype in (torch.float32, torch.bfloat16):
        if can_pack(torch.device("cpu"), dtype):
            name = str(dtype).removeprefix("torch.")
            variants[f"timm packed {name}, 1 task"] = (packed_model(copy.deepcopy(model).to(dtype)), pixels.to(dtype))
    return {name: _inferred(variant.eval().requires_grad_(False), x) for name, (variant, x) in variants.items()}


def packed_model(model: VisionTransformer) -> VisionTransformer:
    for block in model.blocks:
        for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(parent, name, Packed(getattr(parent, name)))
    return model


def _inferred(run: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    def once() -> object:
        with torch.inference_mode():
            return run(x)

    return once


def _served(backbone: Backbone, pixels: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """One forward in which each row has a different task."""
    rack = Rack(dim=backbone.spec.dim, slots=options.tasks, vectors=100_000, dtype=backbone.dtype)
    return _answered(backbone, rack, pixels, [METHOD] * options.tasks, options)


def _by_method(backbone: Backbone, pixels: Tensor, options: argparse.Namespace) -> Variants:
    """The plain forward; all rows of one method; and a mix with one row per method that changes the trunk, repeated to
    fill the batch. In float32, packed if the machine can."""
    methods, tasks = METHODS, options.tasks
    rack = Rack(dim=backbone.spec.dim, slots=tasks * (len(methods) + 1), vectors=60_000, dtype=backbone.dtype)
    variants = {"plain": _inferred(lambda x: vit.forward(backbone, vit.embed(backbone, x), Plain()), pixels)}
    for method in methods:
        variants[method.name] = _answered(backbone, rack, pixels, [method] * tasks, options)
    changing = [method for method in methods if not _lens(backbone, method, 0, options.prompts).head_only]
    mixed = [changing[task % len(changing)] for task in range(tasks)]
    return {**variants, "mixed": _answered(backbone, rack, pixels, mixed, options)}


def _by_residents(backbone: Backbone, pixels: Tensor, options: argparse.Namespace) -> Variants:
    """Every forward draws its rows' tasks anew, uniformly, from all on the rack; the first variant has a single
    task."""
    lens = _lens(backbone, METHOD, 0, options.prompts)
    rack = Rack(
        dim=backbone.spec.dim, slots=options.residents, vectors=options.residents * demand(lens), dtype=backbone.dtype
    )
    seats = [_seat(backbone, rack, METHOD, task, options.prompts) for task in range(options.residents)]
    engine, draw, pixels = Engine(backbone, rack), random.Random(0), pixels.to(backbone.dtype)

    def drawn(residents: int) -> Callable[[], object]:
        def run(x: Tensor) -> object:
            rows = [(picture, seats[draw.randrange(residents)]) for picture in range(len(x))]
            return engine.logits(vit.embed(backbone, x), rows)

        return _inferred(run, pixels)

    return {f"{count:,} resident": drawn(count) for count in sorted({1, min(64, len(seats)), len(seats)})}


def _by_heads(backbone: Backbone, pixels: Tensor, options: argparse.Namespace) -> Variants:
    """The first picture for one `linear` task and for 10 and 100 of them: one trunk pass serves all."""
    [linear] = [method for method in METHODS if method.name == "linear"]
    most = 100
    rack = Rack(dim=backbone.spec.dim, slots=most, vectors=most * CLASSES, dtype=backbone.dtype)
    seats = [_seat(backbone, rack, linear, task, options.prompts) for task in range(most)]
    engine, picture = Engine(backbone, rack), pixels[:1].to(backbone.dtype)

    def answering(tasks: int) -> Callable[[], object]:
        rows = [(0, seat) for seat in seats[:tasks]]
        return _inferred(lambda x: engine.logits(vit.embed(backbone, x), rows), picture)

    return {f"{tasks} task{'s' if tasks > 1 else ''}": answering(tasks) for tasks in (1, 10, most)}


def _answered(
    backbone: Backbone, rack: Rack, pixels: Tensor, methods: Sequence[Method], options: argparse.Namespace
) -> Callable[[], object]:
    """A forward with one picture per task; methods: each task's."""
    engine = Engine(backbone, rack)
    rows = [(task, _seat(backbone, rack, method, task, options.prompts)) for task, method in enumerate(methods)]
    return _inferred(lambda x: engine.logits(vit.embed(backbone, x), rows), pixels.to(backbone.dtype))


def _lens(backbone: Backbone, method: Method, task: int, prompts: int) -> Lens:
    params, lengths = _drawn(backbone, method, task, prompts)
    with torch.inference_mode():
        return method.lower(backbone, {name: value.to(backbone.dtype) for name, value in params.items()}, lengths)


def _seat(backbone: Backbone, rack: Rack, method: Method, task: int, prompts: int) -> Seat:
    lens = _lens(backbone, method, task, prompts)
    place = rack.allocate(lens)
    rack.write(place, lens)
    geometry = Geometry(backbone.spec.image_size, "bicubic", 1.0, "center")
    return Seat(f"task-{task}", "0" * 64, place, ("a",) * CLASSES, geometry, (0.5,) * 3, (0.5,) * 3)


def _drawn(backbone: Backbone, method: Method, seed: int, prompts: int) -> tuple[Params, tuple[int, ...]]:
    lengths = method.prompt_lengths(backbone.spec, prompts)
    return method.init(backbone.spec, lengths, CLASSES, torch.Generator().manual_seed(seed)), lengths


def _fitted(backbone: Backbone, pixels: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """Forward and backward of a training step, without the optimiser: parameters are float32, the lens is cast."""
    params, lengths = _drawn(backbone, METHOD, 0, options.prompts)
    params = {name: value.requires_grad_(True) for name, value in params.items()}
    x, targets = pixels.to(backbone.dtype), torch.arange(len(pixels)) % CLASSES

    def once() -> None:
        lens = METHOD.lower(backbone, {name: value.to(backbone.dtype) for name, value in params.items()}, lengths)
        features = vit.forward(backbone, vit.embed(backbone, x), condition(lens, len(x)))
        logits = vit.classify(features, lens).float()
        F.cross_entropy(logits, targets).backward()

    return once


if __name__ == "__main__":
    main()
