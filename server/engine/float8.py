"""Frozen linear layers in 8 bits: float8_e4m3fn (Micikevicius et al., FP8 Formats for Deep Learning, 2022).

    weight [O, D]   one scale per output, computed once
    x [M, D]        one scale per row, computed in every call
    x · weightᵀ     `torch._scaled_mm`: tensor cores, on CUDA devices of capability 8.9 and newer

Queries, keys, values, projection and MLP of the blocks are multiplied in 8 bits. Norms, softmax, sums, GELU, patch
embedding, rack, additions and heads stay in the backbone's dtype; so do a lens's keys and values, which are computed
once, and every product that needs a gradient. A CPU computes the same numbers, slowly: for tests and for measuring the
rounding error, not for serving.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .packed import PlainLinear

FLOAT8: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(FLOAT8).max
CAPABILITY: Final = (8, 9)
MULTIPLE: Final = 16  # the tensor cores need numbers of inputs and outputs that are multiples of it


class Float8Linear(PlainLinear):
    """weight: [O, D] in the dtype of x; bias: [O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._rounded, self._scale = rounded(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self.exact(x)
        flat, scale = rounded(x.reshape(-1, x.shape[-1]))
        product = torch._scaled_mm(flat, self._rounded.t(), scale, self._scale.t(), out_dtype=x.dtype)
        return (product if self._bias is None else product + self._bias).view(*x.shape[:-1], -1)

    def exact(self, x: Tensor) -> Tensor:
        """The product in x's dtype: for prompts, when a lens is made, and for gradients."""
        return super().__call__(x)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [M, D] to 8 bits. Returns [M, D] and each row's scale [M, 1] in float32; their product is x up to
    rounding. The largest magnitude of a row maps to float8's largest number."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def unsupported_device(device: torch.device) -> str | None:
    """Return why this device cannot serve in 8 bits; None if it can."""
    if device.type != "cuda":
        return f"expected a CUDA device of capability {_words(CAPABILITY)} or newer, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"expected capability {_words(CAPABILITY)} or newer, this device has {_words(capability)}"
    return None


def unsupported_widths(widths: set[int]) -> str | None:
    """Return why layers of these widths cannot be multiplied in 8 bits; None if they can."""
    unfit = sorted(width for width in widths if width % MULTIPLE)
    return f"expected layers whose widths are multiples of {MULTIPLE}, got {unfit}" if unfit else None


def _words(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
