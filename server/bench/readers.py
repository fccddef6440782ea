"""`python -m server bench readers`: one picture for many tasks, and fitting speed in pictures a second.

One CPU thread, CPU time, so that other load on the machine matters as little as possible; methods take turns, round
after round, and medians are reported with their ratio to one `linear` task. Weights are random: times do not depend on
them. A step of fitting is forward, backward and optimiser. For `readonly` it is measured twice: with the trunk's keys
and values cached, as in every epoch but the first, and with the trunk run anew, as when they do not fit into memory.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.images.decode import Geometry
from server.engine.lens import condition
from server.engine.rack import Rack
from server.engine.residency import Seat
from server.methods.method import Method
from server.methods.registry import Registry
from server.training.co_batching import Fitting, ForwardRequest, RecordedRows, run_alone
from server.training.optimizer import make_optimizer
from server.training.recipe import resolve

from .engine import in_turns

CLASSES = 10
COUNTS = (1, 10, 100, 1000)
SERVED = ("linear", "readonly", "vpt_deep")
FITTED = ("readonly", "vpt_deep")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = Backbone.of(options.arch, timm.create_model(options.arch, num_classes=0), dtype=DTYPES[options.dtype])
    serving = {
        name: in_turns({method: _answering(backbone, method, count, options) for method in methods}, options.rounds)
        for name, count, methods in _groups(options.most)
    }
    fitting = {
        name: options.batch / ms * 1e3 for name, ms in in_turns(_steps(backbone, options), options.rounds).items()
    }
    report = {"arch": options.arch, "dtype": options.dtype, "torch": torch.__version__, "serving": serving}
    report["pictures_per_s"] = {name: round(rate, 1) for name, rate in fitting.items()}
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def table(report: dict[str, Any]) -> str:
    """Markdown: CPU ms per picture by method and number of tasks; pictures a second of fitting."""
    serving, single = report["serving"], report["serving"]["1"]["linear"]
    lines = [f"| one picture × tasks | {' | '.join(SERVED)} |", "|---|" + "---|" * len(SERVED)]
    for count, times in serving.items():
        cells = [f"{times[name]:,.1f} ms ({times[name] / single:,.1f}×)" if name in times else "–" for name in SERVED]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    lines += ["", "| fitting | pictures / CPU s |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {rate:,.0f} |" for name, rate in report["pictures_per_s"].items()])


def _groups(most: int) -> list[tuple[str, int, list[str]]]:
    """Prompts that change the trunk run it once per task: 100 tasks are enough to show that."""
    counts = [count for count in COUNTS if count <= most]
    return [(str(count), count, [name for name in SERVED if name != "vpt_deep" or count <= 100]) for count in counts]


def _answering(backbone: Backbone, name: str, tasks: int, options: argparse.Namespace) -> Callable[[], object]:
    """One picture for `tasks` tasks, in one forward."""
    method, size = Registry().get(name), backbone.spec.image_size
    lengths = method.prompt_lengths(backbone.spec, options.prompts)
    params = method.init(backbone.spec, lengths, CLASSES, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        lens = method.lower(backbone, {key: value.to(backbone.dtype) for key, value in params.items()}, lengths)
        rack = Rack.sized(
            dim=backbone.spec.dim, slots=tasks, size_bytes=options.rack, device="cpu", dtype=backbone.dtype
        )
        geometry, rows = Geometry(size, "bicubic", 1.0, "center"), []
        for task in range(tasks):
            place = rack.allocate(lens)
            rack.write(place, lens)
            seat = Seat(f"task-{task}", "0" * 64, place, ("a",) * CLASSES, geometry, (0.5,) * 3, (0.5,) * 3)
            rows.append((0, seat))
    pixels, engine = torch.randn(1, 3, size, size).to(backbone.dtype), Engine(backbone, rack)

    def answer() -> object:
        with torch.inference_mode():
            return engine.logits(vit.embed(backbone, pixels), rows)

    return answer


def _steps(backbone: Backbone, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    pixels = torch.randn(options.batch, 3, backbone.spec.image_size, backbone.spec.image_size).to(backbone.dtype)
    with torch.inference_mode():
        x = vit.embed(backbone, pixels).clone()
        kept = RecordedRows(vit.record(backbone, x, 0), None)
    x = x.clone()
    steps = {name: _step(backbone, Registry().get(name), x, None, options) for name in FITTED}
    return {"readonly, trunk kept": _step(backbone, Registry().get("readonly"), x, kept, options), **steps}


def _step(
    backbone: Backbone, method: Method, x: Tensor, kept: RecordedRows | None, options: argparse.Namespace
) -> Callable[[], object]:
    lengths = method.prompt_lengths(backbone.spec, options.prompts)
    params = method.init(backbone.spec, lengths, CLASSES, torch.Generator().manual_seed(0))
    params = {name: value.requires_grad_() for name, value in params.items()}
    optimizer, targets = make_optimizer(params, resolve(method.defaults, {})), torch.arange(len(x)) % CLASSES
    everything = torch.arange(len(x))

    def fitting() -> Fitting[None]:
        lens = method.lower(backbone, {name: value.to(backbone.dtype) for name, value in params.items()}, lengths)
        optimizer.zero_grad(set_to_none=True)
        batch = None if kept is None else RecordedRows(kept.rows.take(everything), None)
        rows, tokens = condition(lens, len(x)), x if batch is None else x[:0]
        yield ForwardRequest(
            tokens,
            rows,
            lambda features: F.cross_entropy(vit.classify(features, lens).float(), targets),
            recorded=batch,
        )
        optimizer.step()

    return lambda: run_alone(backbone, fitting())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    what = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m server bench readers", description=what)
    parser.add_argument("--arch", default="deit_tiny_patch16_224", help="plain timm ViT (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every method (default: %(default)s)")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="most tasks (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--rack", type=int, default=2**30, help="bytes for 1,000 tasks (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
