"""The steps of `bench ladder`: ways to answer the same pictures for the same tasks, used by the engine or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine import pooling
from server.engine.attention import Attend, by_products, fastest, fused, head_by_head
from server.engine.backbone import Backbone
from server.engine.block import FrozenBlock

from .engine import packed_model
from .ladder_bench import Answer, Bench, NotAvailable, Step, exact_ragged, inferred, under
from .ladder_prompts import in_lanes, tensors_per_lens, unpadded
from .ladder_ways import Int8Linear, OneProduct, Separate

Answerer = Callable[[Tensor], Tensor]


def plain_timm(bench: Bench) -> Answer:
    """One task's head on the plain forward, as a server of one model computes it."""
    return inferred(lambda: F.linear(bench.model(bench.pixels), *bench.head))


def packed_timm(bench: Bench) -> Answer:
    """The same with our packed products in place of its linear layers, and nothing else changed."""
    bench.backbone(packed=True)  # raises NotAvailable
    model = packed_model(copy.deepcopy(bench.model))
    return inferred(lambda: F.linear(model(bench.pixels), *bench.head))


def prefix(bench: Bench) -> Answer:
    """The last block for all tokens, as in timm."""
    answer = bench.served(bench.plain)
    return under(lambda: mock.patch.object(pooling, "reads", lambda pool, spec, tokens: tokens), _first_token(answer))


def packed_only(bench: Bench) -> Answer:
    return bench.served(_with(bench.backbone(packed=True), Separate, fused))


def one_product(bench: Bench) -> Answer:
    return bench.served(_with(bench.backbone(packed=True), OneProduct, fused))


def attending(bench: Bench, attention: Attend, dtype: torch.dtype = torch.float32) -> Answer:
    backbone = bench.backbone(dtype, packed=True)
    for block in backbone.blocks:
        block._attend = attention
    return bench.served(backbone)


def int8(bench: Bench) -> Answer:
    backbone = bench.backbone()
    for frozen, block in zip(backbone.blocks, backbone.model.blocks, strict=True):
        dim = block.attn.qkv.in_features
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        frozen._qkv = None
        frozen.query, frozen._keys_values = Int8Linear(weight[:dim], bias[:dim]), Int8Linear(weight[dim:], bias[dim:])
        frozen.project = Int8Linear(block.attn.proj.weight, block.attn.proj.bias)
        frozen.hidden, frozen._fc2 = (Int8Linear(each.weight, each.bias) for each in (block.mlp.fc1, block.mlp.fc2))
    return bench.served(backbone)


def float8(bench: Bench) -> Answer:
    """The products of a GPU's tensor cores, emulated, with bfloat16 between them."""
    try:
        answer = bench.served(bench.backbone(torch.bfloat16, float8=True))
        answer()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise NotAvailable("this build of PyTorch has no products in float8 here") from error
    return answer


def compiled(bench: Bench) -> Answer:
    """Inductor's kernels for the plain forward of one task, with frozen weights: the possible gain."""
    with mock.patch.object(torch._inductor.config, "freezing", True):
        run: Answerer = torch.compile(bench.model)
        try:
            with torch.no_grad():
                run(bench.pixels)
        except Exception as error:
            raise NotAvailable(f"torch.compile: {type(error).__name__}") from error

    def answer() -> Tensor:
        with torch.no_grad():
            return F.linear(run(bench.pixels), *bench.head)

    return answer


HEADS_APART = fastest(True, torch.float32) is head_by_head
STEPS = (
    Step("timm float32, one task", plain_timm, False, "what each row is measured by", truth=None),
    Step("timm packed float32, one task", packed_timm, False, "the plain forward with the weights that the engine has",
         truth=None),
    Step("literal, task by task", Bench.literal, False, "as the papers write it"),
    Step("prefix: prompts as keys and values", prefix, True),
    Step("last block for the class token alone", lambda bench: bench.served(bench.plain), True),
    Step("packed float32 weights", packed_only, True),
    Step("sum and GELU on the product's way", partial(attending, attention=fused), True),
    Step("… queries, keys, values in one product", one_product, False, "no gain worth a second copy of the weights"),
    Step("… attention by two products", partial(attending, attention=by_products), False, "slower in float32"),
    Step("attention head by head", partial(attending, attention=head_by_head), HEADS_APART,
         "" if HEADS_APART else "slower without AVX-512"),
    Step("… prompts and heads stacked from tensors of each task's own", tensors_per_lens, False,
         "ragged lenses do not stack, and CUDA graphs need addresses that stay"),
    Step("… bfloat16, PyTorch's fused attention", partial(attending, attention=fused, dtype=torch.bfloat16), False,
         "that kernel does not multiply in bfloat16"),
    Step("… bfloat16, attention by two products",
         lambda bench: bench.served(bench.backbone(torch.bfloat16, packed=True)), True,
         "where asked for: `LENSRACK_DTYPE=bfloat16`"),
    Step("… int8, dynamic", int8, False, "rounding x costs what the products save"),
    Step("… float8, emulated", float8, False, "for CUDA, where asked for: `LENSRACK_DTYPE=float8`; not timed on a CPU",
         timed=False),
)  # fmt: skip
FINAL = (
    "timm float32, one task",
    "timm packed float32, one task",
    "literal, task by task",
    "attention head by head" if HEADS_APART else "sum and GELU on the product's way",
    "… bfloat16, attention by two products",
)
RAGGED = (
    Step("lengths 0 … p in one lane, masked", lambda bench: bench.served(bench.packed, bench.ragged), True,
         truth=exact_ragged),
    Step("a lane for each length, no mask", in_lanes, False, "no gain over a mask", truth=exact_ragged),
    Step("each row over its own keys, nothing padded or masked", unpadded, False, "no gain over a mask",
         truth=exact_ragged),
)  # fmt: skip
COMPILED = Step("timm, torch.compile, one task", compiled, False, "a compiler on the machine, and minutes at start",
                truth=None)  # fmt: skip


def _with(backbone: Backbone, kind: type[FrozenBlock], attention: Attend) -> Backbone:
    backbone.blocks = [kind(block, packed=backbone.packed) for block in backbone.model.blocks]
    for block in backbone.blocks:
        block._attend = attention
    return backbone


def _first_token(answer: Answer) -> Answer:
    """The last block returns every token; pooling takes the first, as in timm."""

    @contextmanager
    def first() -> Iterator[None]:
        with mock.patch.object(pooling, "_pool", lambda backbone, x, pool, mask: x[:, 0]):
            yield

    return under(first, answer)
