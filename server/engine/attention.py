"""Attention of the frozen blocks: the same sums, multiplied by whatever is fastest where they are.

What goes in: queries [B, H, Q, d], keys and values [B, H, N, d], mask [B, 1, 1, N], True where a key may be seen.
What comes out: [B, Q, H·d].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import multiply, recorded

MANY = 128  # queries; with fewer the products are too small to call for
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's own kernel, on any device, in any dtype, with gradients."""
    return F.scaled_dot_product_attention(query, keys, values, mask).transpose(1, 2).flatten(2)


def by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """As it is written. PyTorch's kernel does not multiply in bfloat16 on a CPU: this takes half of its time, in
    training a third; its price is [B, H, Q, N] scores in memory."""
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


def head_by_head(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Each head of each row by itself, multiplied by oneDNN. PyTorch's kernel has MKL multiply in float32, at half the
    rate on CPUs that are not Intel's and have AVX-512 (see `packed.py`); here a head's scores [Q, N] stay in the cache,
    too. For many queries, one thread and no gradients: else PyTorch's kernel is the better one, or the only one."""
    if query.shape[2] < MANY or torch.get_num_threads() > 1 or recorded(query, keys, values):
        return fused(query, keys, values, mask)
    scaled = torch.mul(query, query.shape[-1] ** -0.5, out=query.new_empty(query.shape))  # contiguous in one pass
    turned = values.contiguous().transpose(-1, -2)
    added = [None] * len(query) if mask is None else _hiding(mask, query.dtype).unbind()
    batch, heads, queries, width = query.shape
    mixed = query.new_empty(batch, queries, heads * width)
    for row in zip(scaled.unbind(), keys.contiguous().unbind(), turned.unbind(), added, mixed.unbind(), strict=True):
        _row_by_head(*row)
    return mixed


def _row_by_head(query: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, into: Tensor) -> None:
    """Of one row: queries, scaled [H, Q, d], keys [H, N, d], values [H, d, N], what is added to every query's scores
    [N]; `into` [Q, H·d] is written."""
    heads = zip(query.unbind(), keys.unbind(), values.unbind(), strict=True)
    torch.cat([multiply(multiply(q, k, added).softmax(dim=-1), v) for q, k, v in heads], dim=-1, out=into)


def _hiding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, N], True where a key may be seen → [B, N], 0 there and -∞ elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, 0, 0]


def fastest(packed: bool, dtype: torch.dtype) -> Attend:
    """Of a backbone's blocks. Where a CPU has no AVX-512, MKL multiplies in float32 as fast as oneDNN does, and its
    products in one kernel are ahead of heads one by one."""
    if not packed:
        return fused
    if dtype == torch.bfloat16:
        return by_products
    return head_by_head if torch.backends.cpu.get_cpu_capability() == "AVX512" else fused
