"""The steps of `bench ladder`: ways to answer the same pictures for the same tasks, taken by the engine or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from server.bench.engine import packed_model
from server.engine import pooling, reference, vit
from server.engine.attend import Attend, by_products, fused
from server.engine.backbone import Backbone, load_weights
from server.engine.block import FrozenBlock
from server.engine.engine import Engine, Work
from server.engine.graphs import recorded
from server.engine.images import Geometry
from server.engine.packed import PackedLinear, can_pack
from server.engine.rack import Rack
from server.engine.recorder import CudaRecorder
from server.engine.residency import Seat
from server.methods.method import Params
from server.methods.vpt_deep import VptDeep

METHOD = VptDeep()
CLASSES = 10
CPU = torch.device("cpu")
Answer = Callable[[], Tensor]  # logits [tasks, CLASSES]
Answerer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """A row of the ladder. `start` makes what is timed, or raises NotHere; `taken`: whether the engine does so;
    `timed`: whether its time here says anything."""

    name: str
    start: Callable[[Bench], Answer]
    taken: bool
    why: str = ""
    timed: bool = True


class NotHere(RuntimeError):
    """This machine or this build of PyTorch cannot take the step; the message says what is lacking."""


class Bench:
    """Pictures [tasks, 3, S, S], a task each with prompts of its own, and one timm model for all rows."""

    def __init__(self, arch: str, tasks: int, prompts: int, *, weights: Path | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.arch, self.tasks = arch, tasks
        self.model: VisionTransformer = timm.create_model(arch, num_classes=0).eval().requires_grad_(False)
        if weights is not None:
            load_weights(self.model, weights)
        self.plain = self.eye()
        size = self.plain.spec.image_size
        self.pixels = torch.randn(tasks, 3, size, size)
        self.lengths = METHOD.prompt_lengths(self.plain.spec, prompts)
        self.params = [self._params(task, self.lengths) for task in range(tasks)]

    def eye(self, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> Backbone:
        if packed and not can_pack(CPU, dtype):
            raise NotHere(f"this machine or build of PyTorch packs no {dtype} weights")
        model = timm.create_model(self.arch, num_classes=0)
        model.load_state_dict(self.model.state_dict())
        return Backbone.of(self.arch, model, dtype=dtype, packed=packed)

    def _params(self, task: int, lengths: Sequence[int]) -> Params:
        drawn = METHOD.init(self.plain.spec, tuple(lengths), CLASSES, torch.Generator().manual_seed(task))
        drawn["head.weight"] = torch.randn(drawn["head.weight"].shape, generator=torch.Generator().manual_seed(task))
        return drawn

    def literal(self, dtype: torch.dtype = torch.float32) -> Answer:
        """Task by task, as the papers write it."""
        eye = self.eye(dtype)
        tasks = [{name: value.to(dtype) for name, value in own.items()} for own in self.params]

        def answer() -> Tensor:
            rows = zip(self.pixels.to(dtype), tasks, strict=True)
            return torch.cat([reference.vpt_deep(eye, row[None], own, self.lengths) for row, own in rows])

        return _inferred(answer)

    def served(self, eye: Backbone, lengths: Sequence[Sequence[int]] | None = None) -> Answer:
        """All rows in one forward of the engine; lengths: of each task's prompts, where they differ."""
        rack = Rack(dim=eye.spec.dim, slots=self.tasks, vectors=self.tasks * 10_000, dtype=eye.dtype)
        engine, rows = Engine(eye, rack), []
        for task in range(self.tasks):
            own = self.lengths if lengths is None else tuple(lengths[task])
            params = self.params[task] if lengths is None else self._params(task, own)
            rows.append((task, self._seat(eye, rack, task, params, own)))
        return _inferred(lambda: torch.stack(engine.logits(vit.embed(eye, self.pixels.to(eye.dtype)), rows)))

    def _seat(self, eye: Backbone, rack: Rack, task: int, params: Params, lengths: Sequence[int]) -> Seat:
        with torch.inference_mode():
            own = {name: value.to(eye.device, eye.dtype) for name, value in params.items()}
            lens = METHOD.lower(eye, own, tuple(lengths))
        place = rack.allocate(lens)
        rack.write(place, lens)
        geometry = Geometry(eye.spec.image_size, "bicubic", 1.0, "center")
        return Seat(f"task-{task}", "0" * 64, place, ("a",) * CLASSES, geometry, (0.5,) * 3, (0.5,) * 3)

    def on_cuda(self, *, by_graph: bool) -> Answer:
        """uint8 pictures of its own to logits on the host, in float32. What is measured is the host's CPU time."""
        if not torch.cuda.is_available():
            raise NotHere("no CUDA")
        device = torch.device("cuda", torch.cuda.current_device())
        model = timm.create_model(self.arch, num_classes=0)
        model.load_state_dict(self.model.state_dict())
        eye = Backbone.of(self.arch, model, device=device)
        rack = Rack(dim=eye.spec.dim, slots=self.tasks + 3, vectors=self.tasks * 10_000, device=device)
        wanted = [(self.tasks, self.lengths[0])]
        graphs = recorded(eye, rack, partial(CudaRecorder, device), wanted) if by_graph else None
        if graphs is not None and not graphs.graphs:
            raise NotHere("the graph was refused")
        engine, size, drawn = Engine(eye, rack, graphs), eye.spec.image_size, np.random.default_rng(0)
        seats = [self._seat(eye, rack, task, own, self.lengths) for task, own in enumerate(self.params)]
        work: list[Work] = [(drawn.integers(0, 256, (size, size, 3), np.uint8), seat) for seat in seats]
        return lambda: torch.from_numpy(np.stack(engine.run(work)))


# --- the steps --------------------------------------------------------------------------------------------------------


def plain_timm(bench: Bench) -> Answer:
    """One task's head on the plain forward: what a server of one model would do."""
    head = bench.params[0]["head.weight"], bench.params[0]["head.bias"]
    return _inferred(lambda: F.linear(bench.model(bench.pixels), *head))


def packed_timm(bench: Bench) -> Answer:
    """The same with our packed products in the place of its linear layers, and nothing else changed."""
    bench.eye(packed=True)  # or NotHere
    model = packed_model(copy.deepcopy(bench.model))
    head = bench.params[0]["head.weight"], bench.params[0]["head.bias"]
    return _inferred(lambda: F.linear(model(bench.pixels), *head))


def prefix(bench: Bench) -> Answer:
    """The last block for all tokens, as timm has it."""
    answer = bench.served(bench.plain)
    return _under(lambda: mock.patch.object(pooling, "reads", lambda pool, spec, tokens: tokens), _first_token(answer))


def packed_only(bench: Bench) -> Answer:
    return bench.served(_with(bench.eye(packed=True), Separate, fused))


def one_product(bench: Bench) -> Answer:
    return bench.served(_with(bench.eye(packed=True), OneProduct, fused))


def attending(bench: Bench, attention: Attend, dtype: torch.dtype = torch.float32) -> Answer:
    eye = bench.eye(dtype, packed=True)
    for block in eye.blocks:
        block._attend = attention
    return bench.served(eye)


def int8(bench: Bench) -> Answer:
    eye = bench.eye()
    for own, block in zip(eye.blocks, eye.model.blocks, strict=True):
        dim = block.attn.qkv.in_features
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        own._qkv = None
        own.query, own._keys_values = Int8Linear(weight[:dim], bias[:dim]), Int8Linear(weight[dim:], bias[dim:])
        own.project = Int8Linear(block.attn.proj.weight, block.attn.proj.bias)
        own.hidden, own._fc2 = (Int8Linear(each.weight, each.bias) for each in (block.mlp.fc1, block.mlp.fc2))
    return bench.served(eye)


def float8(bench: Bench) -> Answer:
    """The numbers that a GPU's tensor cores multiply, in bfloat16's place between the products."""
    model = timm.create_model(bench.arch, num_classes=0)
    model.load_state_dict(bench.model.state_dict())
    try:
        answer = bench.served(Backbone.of(bench.arch, model, dtype=torch.bfloat16, float8=True))
        answer()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise NotHere("this build of PyTorch has no products in float8 here") from error
    return answer


def compiled(bench: Bench) -> Answer:
    """Inductor's kernels for the plain forward of one task, the weights frozen into them: what there is to win."""
    head = bench.params[0]["head.weight"], bench.params[0]["head.bias"]
    with mock.patch.object(torch._inductor.config, "freezing", True):
        run: Answerer = torch.compile(bench.model)
        try:
            with torch.no_grad():
                run(bench.pixels)
        except Exception as error:
            raise NotHere(f"torch.compile: {type(error).__name__}") from error

    def answer() -> Tensor:
        with torch.no_grad():
            return F.linear(run(bench.pixels), *head)

    return answer


def ragged(bench: Bench, lanes: Callable[[Answer], Answer]) -> Answer:
    """Prompts of 0 … p, another length for each task."""
    most = bench.lengths[0]
    lengths = [tuple([task * most // max(1, bench.tasks - 1)] * len(bench.lengths)) for task in range(bench.tasks)]
    return lanes(bench.served(bench.eye(packed=True), lengths))


def by_length(answer: Answer) -> Answer:
    """A lane for each length: no mask, but attention in smaller pieces."""
    own = Rack.lane
    with_length = mock.patch.object(
        Rack, "lane", lambda rack, place: (own(rack, place), tuple(rack._check(place).lengths))
    )
    return _under(lambda: with_length, answer)


STEPS = (
    Step("timm float32, one task", plain_timm, False, "what each row is measured by"),
    Step("timm packed float32, one task", packed_timm, False, "the plain forward with the weights that the engine has"),
    Step("literal, task by task", Bench.literal, False, "as the papers write it"),
    Step("prefix: prompts as keys and values", prefix, True),
    Step("last block for the class token alone", lambda bench: bench.served(bench.plain), True),
    Step("packed float32 weights", packed_only, True),
    Step("sum and GELU on the product's way", partial(attending, attention=fused), True),
    Step("… queries, keys, values in one product", one_product, False, "no gain worth a second copy of the weights"),
    Step("… attention by two products", partial(attending, attention=by_products), False, "slower in float32"),
    Step("attention head by head", lambda bench: bench.served(bench.eye(packed=True)), True),
    Step("… bfloat16, PyTorch's fused attention", partial(attending, attention=fused, dtype=torch.bfloat16), False,
         "that kernel does not multiply in bfloat16"),
    Step("… bfloat16, attention by two products", lambda bench: bench.served(bench.eye(torch.bfloat16, packed=True)),
         True, "where asked for: `LENSRACK_DTYPE=bfloat16`"),
    Step("… int8, dynamic", int8, False, "rounding x costs what the products save"),
    Step("… float8, emulated", float8, False, "for CUDA, where asked for: `LENSRACK_DTYPE=float8`; not timed on a CPU",
         timed=False),
)  # fmt: skip
FINAL = (
    "timm float32, one task",
    "timm packed float32, one task",
    "literal, task by task",
    "attention head by head",
    "… bfloat16, attention by two products",
)
RAGGED = (
    Step("lengths 0 … p in one lane, masked", lambda bench: ragged(bench, lambda answer: answer), True),
    Step("a lane for each length, no mask", lambda bench: ragged(bench, by_length), False),
)
CUDA = (
    Step("CUDA float32, launched one by one", lambda bench: bench.on_cuda(by_graph=False), True,
         "the host's time, waiting included; the device's is `bench device`'s"),
    Step("CUDA float32, by CUDA graphs", lambda bench: bench.on_cuda(by_graph=True), False,
         "where asked for: `LENSRACK_CUDA_GRAPHS`"),
)  # fmt: skip
COMPILED = Step("timm, torch.compile, one task", compiled, False, "a compiler on the machine, and minutes at start")


class Separate(FrozenBlock):
    """Sums and GELU as operations of their own."""

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        found: Tensor = x + self.ls1(self.project(mixed))
        return found

    def after_mlp(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.ls2(self.behind_hidden(self.hidden(self.norm2(x))))
        return found


class OneProduct(FrozenBlock):
    def __init__(self, block: Block, *, packed: bool) -> None:
        super().__init__(block, packed=packed)
        self._qkv = PackedLinear(block.attn.qkv.weight, block.attn.qkv.bias)


class Int8Linear:
    """Weights in 8 bits, a scale for each output; x in 8 bits, a scale for each row, found in every call."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._scale = weight.abs().amax(1).clamp_min(1e-8) / 127
        self._rounded = (weight / self._scale[:, None]).round().to(torch.int8).t()
        self._bias, self._plain = bias, weight
        try:
            self(torch.zeros(2, weight.shape[1]))
        except (AttributeError, RuntimeError) as error:
            raise NotHere("this build of PyTorch has no products in 8 bits here") from error

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        found = torch._int_mm((flat / scale).round().to(torch.int8), self._rounded)
        return torch.addcmul(self._bias, found * scale, self._scale).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._plain)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        return base + self(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))


def _with(eye: Backbone, kind: type[FrozenBlock], attention: Attend) -> Backbone:
    eye.blocks = [kind(block, packed=eye.packed) for block in eye.model.blocks]
    for block in eye.blocks:
        block._attend = attention
    return eye


def _inferred(answer: Answer) -> Answer:
    def once() -> Tensor:
        with torch.inference_mode():
            return answer()

    return once


def _under(patch: Callable[[], Any], answer: Answer) -> Answer:
    def once() -> Tensor:
        with patch():
            return answer()

    return once


def _first_token(answer: Answer) -> Answer:
    """With every token out of the last block, pooling takes the first as it does in timm."""

    @contextmanager
    def first() -> Iterator[None]:
        with mock.patch.object(pooling, "_pool", lambda backbone, x, pool, mask: x[:, 0]):
            yield

    return _under(first, answer)
