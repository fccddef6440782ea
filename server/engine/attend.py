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
    rate on CPUs that are not Intel's (see `packed.py`); here a head's scores [Q, N] stay in the cache, too. For many
    queries, one thread and no gradients: else PyTorch's kernel is the better one, or the only one."""
    if query.shape[2] < MANY or torch.get_num_threads() > 1 or recorded(query, keys, values):
        return fused(query, keys, values, mask)
    rows, heads, queries, width = query.shape
    query, keys, values = (query * width**-0.5).contiguous(), keys.contiguous(), values.contiguous()
    hidden = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    mixed = query.new_empty(rows, queries, heads, width)
    for row in range(rows):
        added = None if hidden is None else hidden[row, 0, 0]  # to the scores of every query [N]
        for head in range(heads):
            scores = multiply(query[row, head], keys[row, head], added)
            mixed[row, :, head] = multiply(scores.softmax(dim=-1), values[row, head].t())
    return mixed.flatten(2)
