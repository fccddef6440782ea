"""Attention of the frozen blocks: one result, computed by the kernel that is fastest on the device.

Inputs: queries [B, H, Q, d], keys and values [B, H, N, d], mask [B, 1, 1, N], True where a key is visible.
Output: [B, Q, H·d].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import multiply, recorded

MANY = 128  # queries; with fewer, the calls cost more than the products
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's own kernel, on any device, in any dtype, with gradients."""
    return F.scaled_dot_product_attention(query, keys, values, mask).transpose(1, 2).flatten(2)


def by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as three explicit steps. PyTorch's kernel has no bfloat16 products on a CPU: this takes half of its
    time, a third in training, and [B, H, Q, N] scores in memory."""
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


def head_by_head(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention for each head of each row separately, multiplied by oneDNN. In float32 PyTorch's kernel calls MKL,
    which runs at half the rate on CPUs that have AVX-512 and are not Intel's (see `packed.py`); here a head's scores
    [Q, N] also stay in the cache. Used for many queries on one thread without gradients; otherwise PyTorch's kernel is
    faster, or the only one that works."""
    if query.shape[2] < MANY or torch.get_num_threads() > 1 or recorded(query, keys, values):
        return fused(query, keys, values, mask)
    scaled = torch.mul(query, query.shape[-1] ** -0.5, out=query.new_empty(query.shape))  # contiguous in one pass
    transposed = values.contiguous().transpose(-1, -2)
    bias = [None] * len(query) if mask is None else _hiding(mask, query.dtype).unbind()
    batch, heads, queries, width = query.shape
    mixed = query.new_empty(batch, queries, heads * width)
    for row in zip(scaled.unbind(), keys.contiguous().unbind(), transposed.unbind(), bias, mixed.unbind(), strict=True):
        _row_by_head(*row)
    return mixed


def _row_by_head(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """One row: scaled queries [H, Q, d], keys [H, N, d], values [H, d, N], bias of every query's scores [N]. Writes
    `out` [Q, H·d]."""
    heads = zip(query.unbind(), keys.unbind(), values.unbind(), strict=True)
    torch.cat([multiply(multiply(q, k, bias).softmax(dim=-1), v) for q, k, v in heads], dim=-1, out=out)


def _hiding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask [B, 1, 1, N], True where a key is visible → bias [B, N], 0 there and -∞ elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, 0, 0]


def fastest(packed: bool, dtype: torch.dtype) -> Attend:
    """The kernel for a backbone's blocks. Without AVX-512, MKL multiplies float32 as fast as oneDNN does, so one fused
    kernel beats head by head."""
    if not packed:
        return fused
    if dtype == torch.bfloat16:
        return by_products
    return head_by_head if torch.backends.cpu.get_cpu_capability() == "AVX512" else fused
