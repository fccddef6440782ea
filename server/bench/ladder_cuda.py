"""The steps of `bench ladder` that a CUDA device takes: whole batches, from uint8 pictures to logits on the host.

What is measured is the host's CPU time, waiting included; the device's is `bench device`'s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from server.engine.backbone import Backbone

from .ladder_bench import Answer, Bench, NotHere, Step, true_shown, true_shown_ragged, under
from .ladder_prompts import Varlen, attending_unpadded, end_to_end


def one_by_one(bench: Bench) -> Answer:
    backbone = _backbone(bench)
    return bench.shown(backbone, bench.lenses(backbone, bench.even))


def from_pageable(bench: Bench) -> Answer:
    """As above, but from and to memory that the driver has not pinned."""
    backbone = _backbone(bench)
    return bench.shown(backbone, bench.lenses(backbone, bench.even), pinned=False)


def by_graphs(bench: Bench) -> Answer:
    backbone = _backbone(bench)
    return bench.shown(backbone, bench.lenses(backbone, bench.even), graphs=bench.graphs)


def masked(bench: Bench) -> Answer:
    backbone = _backbone(bench, torch.bfloat16)
    return bench.shown(backbone, bench.lenses(backbone, bench.ragged))


def unpadded(bench: Bench) -> Answer:
    """By PyTorch's attention over rows of any length."""
    backbone, varlen = _backbone(bench, torch.bfloat16), _varlen()
    answer = unpadded_by(varlen, bench, backbone)
    try:
        answer()
    except (NotImplementedError, RuntimeError) as error:
        raise NotHere(f"varlen_attn: {type(error).__name__}") from error
    return answer


def unpadded_by(varlen: Varlen, bench: Bench, backbone: Backbone) -> Answer:
    answer = bench.shown(backbone, bench.lenses(backbone, bench.ragged))
    return under(partial(attending_unpadded, end_to_end(varlen)), answer)


def _backbone(bench: Bench, dtype: torch.dtype = torch.float32) -> Backbone:
    if not torch.cuda.is_available():
        raise NotHere("no CUDA")
    return bench.backbone(dtype, device=torch.device("cuda", torch.cuda.current_device()))


def _varlen() -> Varlen:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotHere("this build of PyTorch has no varlen_attn") from error

    def attend(*given: Any) -> Tensor:
        found = varlen_attn(*given)
        return found if isinstance(found, Tensor) else found[0]

    return attend


CUDA = (
    Step("CUDA float32, launched one by one", one_by_one, True,
         "the host's time, waiting included; the device's is `bench device`'s", truth=true_shown),
    Step("… through memory that is not pinned", from_pageable, False, "the host waits for each copy", truth=true_shown),
    Step("CUDA float32, by CUDA graphs", by_graphs, False, "where asked for: `LENSRACK_CUDA_GRAPHS`", truth=true_shown),
    Step("CUDA bfloat16, lengths 0 … p in one lane, masked", masked, True, truth=true_shown_ragged),
    Step("… over each row's own keys, by `varlen_attn`", unpadded, False, "PyTorch's kernel, for 16 bits alone",
         truth=true_shown_ragged),
)  # fmt: skip
