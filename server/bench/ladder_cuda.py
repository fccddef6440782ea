"""The steps of `bench ladder` on a CUDA device: whole batches, from uint8 pictures to logits on the host.

Measured is the host's CPU time including waiting; `bench device` measures the device's time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from server.engine.backbone import Backbone

from .ladder_bench import Answer, Bench, NotAvailable, Step, exact_images, exact_images_ragged, under
from .ladder_prompts import Varlen, attending_unpadded, end_to_end


def one_by_one(bench: Bench) -> Answer:
    backbone = _backbone(bench)
    return bench.from_images(backbone, bench.lenses(backbone, bench.even))


def from_pageable(bench: Bench) -> Answer:
    """As above, with host memory that is not pinned."""
    backbone = _backbone(bench)
    return bench.from_images(backbone, bench.lenses(backbone, bench.even), pinned=False)


def by_graphs(bench: Bench) -> Answer:
    backbone = _backbone(bench)
    return bench.from_images(backbone, bench.lenses(backbone, bench.even), graphs=bench.graphs)


def masked(bench: Bench) -> Answer:
    backbone = _backbone(bench, torch.bfloat16)
    return bench.from_images(backbone, bench.lenses(backbone, bench.ragged))


def unpadded(bench: Bench) -> Answer:
    """With PyTorch's attention over rows of any length."""
    backbone, varlen = _backbone(bench, torch.bfloat16), _varlen()
    answer = unpadded_by(varlen, bench, backbone)
    try:
        answer()
    except (NotImplementedError, RuntimeError) as error:
        raise NotAvailable(f"varlen_attn: {type(error).__name__}") from error
    return answer


def unpadded_by(varlen: Varlen, bench: Bench, backbone: Backbone) -> Answer:
    answer = bench.from_images(backbone, bench.lenses(backbone, bench.ragged))
    return under(partial(attending_unpadded, end_to_end(varlen)), answer)


def _backbone(bench: Bench, dtype: torch.dtype = torch.float32) -> Backbone:
    if not torch.cuda.is_available():
        raise NotAvailable("no CUDA")
    return bench.backbone(dtype, device=torch.device("cuda", torch.cuda.current_device()))


def _varlen() -> Varlen:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotAvailable("this build of PyTorch has no varlen_attn") from error

    def attend(*args: Any) -> Tensor:
        result = varlen_attn(*args)
        return result if isinstance(result, Tensor) else result[0]

    return attend


CUDA = (
    Step("CUDA float32, launched one by one", one_by_one, True,
         "the host's time, waiting included; the device's is `bench device`'s", truth=exact_images),
    Step("… through memory that is not pinned", from_pageable, False, "the host waits for each copy",
         truth=exact_images),
    Step("CUDA float32, by CUDA graphs", by_graphs, False, "where asked for: `LENSRACK_CUDA_GRAPHS`",
         truth=exact_images),
    Step("CUDA bfloat16, lengths 0 … p in one lane, masked", masked, True, truth=exact_images_ragged),
    Step("… over each row's own keys, by `varlen_attn`", unpadded, False, "PyTorch's kernel, for 16 bits alone",
         truth=exact_images_ragged),
)  # fmt: skip
