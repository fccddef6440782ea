"""`python -m server bench device`: whether a device gives the CPU's answers and gradients, and how fast it is.

First correctness: one batch with a row of every method, and the gradients of every method's parameters, on the device
in float64, float32 and bfloat16, compared with the literal formulation in float64 on the CPU; and the engine's CUDA
graphs compared with its ordinary forward. Then speed: the plain timm forward of one task, the literal formulation, the
engine with one task per row, timm and the plain trunk captured as a CUDA graph, and the engine from uint8 pictures to
logits on the host, launched one by one and by its own graphs; each with its share of the rate at which the device
multiplies matrices of those sizes. Weights are random. Exits with 1 if an answer or a gradient differs by more than
rounding explains. Needs torch, timm, numpy, Pillow and safetensors only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from server.engine import graphs, reference, vit
from server.engine.backbone import Backbone
from server.engine.batch import Pixels, Work
from server.engine.engine import Engine
from server.engine.graph_recording import record_buckets
from server.engine.graphs import Graphs, buckets
from server.engine.images.decode import Geometry
from server.engine.lens import Lens, Plain, condition
from server.engine.rack import Rack, demand
from server.engine.recorder import CudaRecorder, Recorder, Rerun
from server.engine.residency import Seat
from server.methods.method import Method, Params
from server.methods.registry import METHODS
from server.methods.vpt_deep import VptDeep

CLASSES: Final = 10
CPU: Final = torch.device("cpu")
# The largest rounding error of a logit (in standard deviations of all) or a gradient (in its tensor's largest value).
BOUNDS: Final = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
SERVED: Final = "the engine, uint8 to logits on the host"
BY_GRAPH: Final = f"{SERVED}, by its CUDA graphs"
Run = Callable[[], object]


@dataclass(frozen=True)
class Check:
    """`drift`: the largest difference from the literal formulation; `bound`: the difference that rounding explains."""

    what: str
    dtype: str
    drift: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.drift <= self.bound


@dataclass(frozen=True)
class Speed:
    """`share`: of the measured rate of matrix products; None if the variant could not run, for the reason `why`."""

    what: str
    batch: int
    ms: float | None = None
    images_per_s: float | None = None
    share: float | None = None
    why: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    checks = [check for dtype in BOUNDS for check in _checks(options.check_arch, device, dtype, options.prompts)]
    print(f"{_name(device)}, torch {torch.__version__}\n\n{_table(checks)}\n", flush=True)
    dtype = getattr(torch, options.dtype)
    rate = matmul_rate(options.arch, device, dtype, options.rounds)
    speeds = [speed for batch in options.batches for speed in _speeds(options, device, dtype, batch, rate)]
    print(
        f"{options.arch}, {options.dtype}: {rate / 1e12:.1f} TFLOP/s of matrix products\n\n{_table(speeds)}", flush=True
    )
    if options.json is not None:
        facts = {"device": _name(device), "torch": torch.__version__, "tflops": round(rate / 1e12, 2)}
        report = {**facts, "checks": [asdict(item) for item in checks], "speeds": [asdict(item) for item in speeds]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if all(check.holds for check in checks) else 1)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server bench device", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--check-arch",
        default="deit_tiny_patch16_224",
        help="architecture of the correctness checks (default: %(default)s)",
    )
    parser.add_argument(
        "--arch", default="vit_base_patch16_224", help="architecture of the speed measurements (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the speed measurements (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="batch sizes, each picture with its own task"
    )
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each layer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every variant (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


# --- correctness ------------------------------------------------------------------------------------------------------


def _checks(arch: str, device: torch.device, dtype: torch.dtype, prompts: int) -> Iterator[Check]:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=0).eval().requires_grad_(False)
    truth, backbone = (_backbone(arch, model, *kind) for kind in ((CPU, torch.float64), (device, dtype)))
    size = truth.spec.image_size
    pixels = torch.randn(len(METHODS), 3, size, size, dtype=torch.float64)
    name, bound = str(dtype).removeprefix("torch."), BOUNDS[dtype]
    yield Check("answers, all methods in one batch", name, _answers_drift(truth, backbone, pixels, prompts), bound)
    yield Check("answers by recorded forwards", name, _graphs_drift(backbone, prompts), graphs.BOUNDS[name])
    for method in METHODS:
        yield Check(
            f"gradients, {method.name}", name, _gradients_drift(truth, backbone, method, pixels[:2], prompts), bound
        )


def _answers_drift(truth: Backbone, backbone: Backbone, pixels: Tensor, prompts: int) -> float:
    params = [_params(truth, method, seed, prompts) for seed, method in enumerate(METHODS)]
    rows = zip(METHODS, params, pixels, strict=True)
    with torch.inference_mode():
        expected = torch.stack([_literal(truth, method, drawn, row[None], prompts)[0] for method, drawn, row in rows])
        rack = Rack(
            dim=backbone.spec.dim, slots=len(METHODS), vectors=100_000, device=backbone.device, dtype=backbone.dtype
        )
        places = zip(METHODS, params, strict=True)
        seats = [_seat(backbone, rack, _lens(backbone, method, drawn, prompts)) for method, drawn in places]
        x = vit.embed(backbone, pixels.to(backbone.device, backbone.dtype))
        actual = torch.stack(Engine(backbone, rack).logits(x, list(enumerate(seats)))).double().cpu()
    return float((actual - expected).abs().max() / expected.std())


def _graphs_drift(backbone: Backbone, prompts: int) -> float:
    """Difference of recorded forwards from the ordinary one; infinite if one could not be recorded. On a CPU the work
    is run again instead, in the same buckets and with the same padding."""
    rack = Rack(dim=backbone.spec.dim, slots=3, vectors=100_000, device=backbone.device, dtype=backbone.dtype)
    recorded = record_buckets(backbone, rack, partial(_recorder, backbone.device), buckets(4, (0, prompts)))
    return float("inf") if recorded.counts.refused else recorded.drift


def _recorder(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else Rerun()


def _gradients_drift(truth: Backbone, backbone: Backbone, method: Method, pixels: Tensor, prompts: int) -> float:
    """The largest difference of any parameter's gradient, relative to that gradient's largest value."""
    targets, drawn = torch.arange(len(pixels)), _params(truth, method, 1, prompts)
    exact = {name: value.clone().requires_grad_(True) for name, value in drawn.items()}
    F.cross_entropy(_literal(truth, method, exact, pixels, prompts), targets).backward()
    trained = {name: value.to(backbone.device, backbone.dtype).requires_grad_(True) for name, value in drawn.items()}
    lens = method.lower(backbone, trained, method.prompt_lengths(backbone.spec, prompts))
    x = vit.embed(backbone, pixels.to(backbone.device, backbone.dtype))
    logits = vit.classify(vit.forward(backbone, x, condition(lens, len(x))), lens)
    F.cross_entropy(logits, targets.to(backbone.device)).backward()
    return max(_gradient_difference(trained[name].grad, exact[name].grad) for name in drawn)


def _gradient_difference(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    return float((actual.double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


# --- speed ------------------------------------------------------------------------------------------------------------


def matmul_rate(arch: str, device: torch.device, dtype: torch.dtype, rounds: int, rows: int = 12_608) -> float:
    """FLOP/s of the widest product of a block, with the tokens of 64 pictures on a GPU."""
    dim = int(timm.create_model(arch, num_classes=0).num_features)
    rows = rows if device.type == "cuda" else rows // 16
    a, b = torch.randn(rows, dim, device=device, dtype=dtype), torch.randn(dim, 4 * dim, device=device, dtype=dtype)
    flops: int = 2 * rows * dim * 4 * dim
    return flops / _seconds({"": lambda: a @ b}, device, rounds)[""]


def _speeds(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, batch: int, rate: float
) -> Iterator[Speed]:
    torch.manual_seed(0)
    model = timm.create_model(options.arch, num_classes=0).eval().requires_grad_(False)
    backbone, method = _backbone(options.arch, model, device, dtype, packed=True), VptDeep()
    size = backbone.spec.image_size
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    params = [_params(backbone, method, seed, options.prompts) for seed in range(batch)]
    lenses = [_lens(backbone, method, drawn, options.prompts) for drawn in params]
    rack = Rack(dim=backbone.spec.dim, slots=batch, vectors=sum(map(demand, lenses)), device=device, dtype=dtype)
    rows = list(enumerate(_seat(backbone, rack, lens) for lens in lenses))
    engine, plain = Engine(backbone, rack), timm.create_model(options.arch, num_classes=0).to(device, dtype).eval()
    head = params[0]["head.weight"].to(device, dtype)
    runs: dict[str, Run] = {
        "timm, one task": lambda: F.linear(plain(pixels), head),
        f"the engine, {batch} tasks": lambda: engine.logits(vit.embed(backbone, pixels), rows),
        "the engine's plain trunk": lambda: vit.forward(backbone, vit.embed(backbone, pixels), Plain()),
    }
    if batch <= 8:
        at_home = [{name: value.to(device, dtype) for name, value in drawn.items()} for drawn in params]
        runs["literal, task by task"] = lambda: [
            _literal(backbone, method, drawn, row[None], options.prompts)
            for drawn, row in zip(at_home, pixels, strict=True)
        ]
    lacking: dict[str, str] = {}
    for name in ("timm, one task", "the engine's plain trunk"):
        try:
            runs[f"{name}, as a CUDA graph"] = captured(runs[name], device)
        except RuntimeError as error:
            lacking[f"{name}, as a CUDA graph"] = _why(error)
    work = _work(size, [seat for _, seat in rows])
    runs[SERVED] = lambda: engine.run(work)
    try:
        by_graph = Engine(backbone, rack, _graphs(backbone, rack, device, batch, options.prompts))
        runs[BY_GRAPH] = lambda: by_graph.run(work)
    except RuntimeError as error:
        lacking[BY_GRAPH] = _why(error)
    flops = _flops(plain, pixels[:1]) * batch
    for name, seconds in _seconds(runs, device, options.rounds).items():
        share = flops / seconds / rate
        yield Speed(name, batch, round(seconds * 1e3, 3), round(batch / seconds, 1), round(share, 3))
    for name, why in lacking.items():
        yield Speed(name, batch, why=f"not measured: {why}")


def captured(run: Run, device: torch.device) -> Run:
    """The same work as one launch. Raises RuntimeError without CUDA, or if `run` waits for the device."""
    return CudaRecorder(device).record(run)


def _graphs(backbone: Backbone, rack: Rack, device: torch.device, batch: int, prompts: int) -> Graphs:
    """The one graph of this batch, or RuntimeError. It is checked with lenses of its own, on a separate rack."""
    CudaRecorder(device)  # or RuntimeError
    spare = Rack(dim=backbone.spec.dim, slots=3, vectors=100_000, device=device, dtype=backbone.dtype)
    bucket = (batch, prompts)
    if (checked := record_buckets(backbone, spare, partial(CudaRecorder, device), [bucket])).counts.refused:
        raise RuntimeError(f"the graph was refused, {checked.drift:.1e} off")
    with torch.inference_mode():
        graph = graphs.Graph(backbone, rack.slab, bucket, CudaRecorder(device))
    return Graphs(rack, rack.slab, {bucket: graph})


def _work(size: int, seats: Sequence[Seat]) -> list[Work]:
    drawn = np.random.default_rng(0)
    pictures: list[Pixels] = [drawn.integers(0, 256, (size, size, 3), np.uint8) for _ in seats]
    return list(zip(pictures, seats, strict=True))


def _why(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:100]


def _seconds(runs: dict[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Median wall time of each run; runs take turns, and each turn waits for the device."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            with torch.inference_mode(), _timed(device) as seconds:
                run()
            if turn:
                spent[name] += seconds
    return {name: statistics.median(times) for name, times in spent.items()}


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    seconds: list[float] = []
    _wait(device)
    started = time.perf_counter()
    yield seconds
    _wait(device)
    seconds.append(time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(model: torch.nn.Module, pixels: Tensor) -> int:
    """FLOP of one picture in the plain network: the work that every variant has to do, so prompts count as overhead."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    return int(counter.get_total_flops())


# --- tasks ------------------------------------------------------------------------------------------------------------


def _backbone(
    arch: str, model: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, packed: bool = False
) -> Backbone:
    copy = timm.create_model(arch, num_classes=0)
    copy.load_state_dict(model.state_dict())
    return Backbone.of(arch, copy, device=device, dtype=dtype, packed=packed)


def _params(backbone: Backbone, method: Method, seed: int, prompts: int) -> Params:
    """Fresh parameters, none of them zero, in float64 on the CPU."""
    lengths, generator = method.prompt_lengths(backbone.spec, prompts), torch.Generator().manual_seed(seed)
    drawn = method.init(backbone.spec, lengths, CLASSES, generator)
    return {
        name: value.double() + torch.randn(value.shape, generator=generator) * 0.05 for name, value in drawn.items()
    }


def _literal(backbone: Backbone, method: Method, params: Params, pixels: Tensor, prompts: int) -> Tensor:
    return reference.logits(method.name, backbone, pixels, params, method.prompt_lengths(backbone.spec, prompts))


def _lens(backbone: Backbone, method: Method, params: Params, prompts: int) -> Lens:
    cast = {name: value.to(backbone.device, backbone.dtype) for name, value in params.items()}
    with torch.inference_mode():
        return method.lower(backbone, cast, method.prompt_lengths(backbone.spec, prompts))


def _seat(backbone: Backbone, rack: Rack, lens: Lens) -> Seat:
    place = rack.allocate(lens)
    rack.write(place, lens)
    geometry = Geometry(backbone.spec.image_size, "bicubic", 1.0, "center")
    return Seat("task", "0" * 64, place, ("a",) * CLASSES, geometry, (0.5,) * 3, (0.5,) * 3)


# --- tables -----------------------------------------------------------------------------------------------------------


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} (no GPU was measured)"


def _table(rows: Sequence[Any]) -> str:
    """Markdown."""
    if rows and isinstance(rows[0], Check):
        lines = ["| | dtype | drift | rounding explains | |", "|---|---|---|---|---|"]
        holds = {True: "", False: "**too far**"}
        return "\n".join(
            [*lines, *(f"| {r.what} | {r.dtype} | {r.drift:.1e} | {r.bound:.0e} | {holds[r.holds]} |" for r in rows)]
        )
    lines = ["| | batch | ms | images/s | share of the matmul rate |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.ms:,.2f} | {row.images_per_s:,.0f} | {row.share:.0%}" if row.ms else f"– | – | {row.why}"
        lines.append(f"| {row.what} | {row.batch} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
