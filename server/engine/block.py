"""One frozen block of the backbone for the forward: timm's own norms, scales and activation, with our products.

The kind of product is chosen once, when the backbone is loaded: plain, packed (on a CPU) or in 8 bits.
"""

from __future__ import annotations

import torch
from timm.layers import GluMlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .attention import Attend, fastest
from .float8 import Float8Linear
from .packed import Linear, PackedLinear, PlainLinear

Pair = tuple[Tensor, Tensor]  # keys and values


class FrozenBlock:
    """The parts of a pre-norm block of width D. Inputs are [..., D]; only `attend` mixes tokens, and no method mixes
    rows.

    Where weights are packed, queries are a separate product: prompts and the last layer need keys and values alone, and
    a weight packed for each use would be in memory twice. Elsewhere a slice costs nothing and one product saves a
    launch. In 8 bits (`float8.py`) queries are a separate product as well, so that each weight is stored once.
    """

    def __init__(self, block: Block, *, packed: bool, float8: bool = False) -> None:
        kind = Float8Linear if float8 else PackedLinear if packed else PlainLinear
        weight, bias, dim = block.attn.qkv.weight, block.attn.qkv.bias, block.attn.qkv.in_features
        self.heads: int = block.attn.num_heads
        self.norm1, self.norm2, self.ls1, self.ls2 = block.norm1, block.norm2, block.ls1, block.ls2
        self.q_norm, self.k_norm = block.attn.q_norm, block.attn.k_norm
        self.query: Linear = kind(weight[:dim], None if bias is None else bias[:dim])
        self._keys_values: Linear = kind(weight[dim:], None if bias is None else bias[dim:])
        self._qkv: Linear | None = None if packed or float8 else kind(weight, bias)
        self.project: Linear = kind(block.attn.proj.weight, block.attn.proj.bias)
        self.hidden: Linear = kind(block.mlp.fc1.weight, block.mlp.fc1.bias)
        self._fc2: Linear = kind(block.mlp.fc2.weight, block.mlp.fc2.bias)
        self.act, self._mlp_norm = block.mlp.act, block.mlp.norm
        self._gate_last: bool | None = block.mlp.gate_last if isinstance(block.mlp, GluMlp) else None
        self._gelu = self._gate_last is None and type(self.act) is nn.GELU and self.act.approximate == "none"
        self._attend: Attend = fastest(packed, weight.dtype)

    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [..., D]."""
        if self._qkv is None:
            return self.query(normed), *self.keys_values(normed)
        query, keys, values = self._qkv(normed).chunk(3, dim=-1)
        return query, keys, values

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._keys_values(normed).chunk(2, dim=-1)
        return keys, values

    def prompts(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., D] of prompts, computed once per lens and never in 8 bits."""
        linear = self._keys_values
        keys, values = (linear.exact(normed) if isinstance(linear, Float8Linear) else linear(normed)).chunk(2, dim=-1)
        return keys, values

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, before: Pair | None = None
    ) -> Tensor:
        """Queries [B, Q, D] over keys and values [B, N, D] → [B, Q, D]. before: keys and values [B, P, D] that precede
        these; mask: [B, 1, 1, P + N], True where a key is visible."""
        keys, values = self._heads(keys), self._heads(values)
        if (
            before is not None
        ):  # joined per head, the layout that the products read: joining [B, N, D] would cost another copy
            keys, values = (
                torch.cat((self._heads(first), rest), dim=2) for first, rest in zip(before, (keys, values), strict=True)
            )
        return self.mix(self._heads(query), keys, values, mask)

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention on tensors split into heads, see `attention.py`."""
        return self._attend(query, keys, values, mask)

    def softmax(self, scores: Tensor) -> Tensor:
        """Attention weights of readers: scores [B, H, Q, N] → weights that sum to 1 over the keys."""
        return scores.softmax(dim=-1)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x plus the projected attention output `mixed`, both [..., D]."""
        return self.project.onto(x, mixed) if _nothing(self.ls1) else x + self.ls1(self.project(mixed))

    def after_mlp(self, x: Tensor) -> Tensor:
        """x plus its MLP output, [..., D], for lanes without additions to the MLP."""
        hidden = self.hidden.gelu(self.norm2(x)) if self._gelu else self._activated(self.hidden(self.norm2(x)))
        hidden = self._mlp_norm(hidden)
        return self._fc2.onto(x, hidden) if _nothing(self.ls2) else x + self.ls2(self._fc2(hidden))

    def behind_hidden(self, hidden: Tensor) -> Tensor:
        """The second half of the MLP: output of `hidden` [..., H] → [..., D]."""
        return self._fc2(self._mlp_norm(self._activated(hidden)))

    def _activated(self, hidden: Tensor) -> Tensor:
        """The activation. In a gated MLP (Shazeer, GLU Variants Improve Transformer, 2020) one half gates the other:
        [..., H / 2]."""
        if self._gate_last is None:
            return self.act(hidden)
        first, second = hidden.chunk(2, dim=-1)
        return first * self.act(second) if self._gate_last else self.act(first) * second

    def per_head(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Apply the query or key norm, which works on each head separately (identity in most backbones)."""
        if _nothing(norm):
            return x
        return norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)

    def qkv_product(self, x: Tensor) -> Tensor:
        """Product [..., D] → [..., 3·D] without biases: the change of queries, keys and values that a change behind
        `norm1` causes."""
        return torch.cat((self.query.product(x), self._keys_values.product(x)), dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, D] → [B, H, N, d]


def _nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)
