"""The one forward, for serving and for training.

    pixels ──embed──► x [B, N, D] ──12 blocks──► features [B, D] ──head──► logits [B, C]

Rows of one batch may belong to different tasks and methods. They are laid out in lanes: a lane is a group of rows with
the same number of tokens. Everything that treats each token by itself (norms, projections, MLP) runs once over the
tokens of all lanes; only the attention runs lane by lane.

Why a prefix is exact: where a method discards its prompts' outputs at every layer (VPT-deep, Jia et al., ECCV 2022,
section 3.2), prompts reach the image tokens as keys and values only, K_l = W_k·LN_l(P_l) + b_k and likewise V_l. These
do not depend on the image, so they are computed once, when the lens is made (`project`), and the queries and the MLP
run for the image tokens alone. The last block's output is read at the class token only, so only its query is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone
from .block import FrozenBlock
from .lens import Condition, Plain, Prefix


@dataclass
class Lane:
    """Rows with the same number of tokens. x: [B, N, D], the image's tokens first, then the prompts' tokens; they enter
    at block `start`."""

    x: Tensor
    condition: Condition
    token_mask: Tensor | None  # [B, N], False at padding
    start: int = 0

    @classmethod
    def of(cls, x: Tensor, condition: Condition, start: int = 0) -> Lane:
        """Append the condition's tokens to the image's tokens x [B, N, D]. Their place does not matter: prompts get no
        position embedding, and attention does not know order.

        Where the first prompts come at layer `start`, x may be what `tokens_at` says of that layer: what lies before
        does not depend on them.
        """
        if condition.tokens is None:
            return cls(x, condition, None, start)
        mask = condition.token_mask
        if mask is not None:
            mask = torch.cat((mask.new_ones(x.shape[:2]), mask), dim=1)
        return cls(torch.cat((x, condition.tokens), dim=1), condition, mask)


def embed(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Normalised pixels [B, 3, S, S] to the tokens that enter the first block [B, N, D]."""
    model = backbone.model
    return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))


def forward(backbone: Backbone, x: Tensor, condition: Condition) -> Tensor:
    """Image tokens [B, N, D] of rows in one lane to pooled features [B, D]."""
    return forward_lanes(backbone, [Lane.of(x, condition)])[0]


def forward_lanes(backbone: Backbone, lanes: Sequence[Lane]) -> list[Tensor]:
    """Pooled features [B_i, D] of each lane."""
    blocks, spec = backbone.blocks, backbone.spec
    by_class_token = spec.pool == "token"
    for index, block in enumerate(blocks):
        if by_class_token and index == len(blocks) - 1:
            return _pool_class_token(backbone, _last_block(block, lanes, index), lanes)
        if entered := [lane for lane in lanes if lane.start <= index]:
            _block(block, entered, index)
    return [_pool_average(backbone, lane.x) for lane in lanes]


def tokens_at(backbone: Backbone, x: Tensor, layer: int) -> Tensor:
    """Image tokens x [B, N, D] of the first block as the plain backbone hands them to block `layer`: [B, N, D]."""
    lane = Lane.of(x, Plain())
    for index, block in enumerate(backbone.blocks[:layer]):
        _block(block, [lane], index)
    return lane.x


def head(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features [B, D], one head [C, D] and [C] → logits [B, C]."""
    return F.linear(features, weight, bias)


def project(block: FrozenBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [..., p, D] of one layer to the keys and values [..., p, D] that the layer's attention sees of them."""
    keys, values = block.keys_values(block.norm1(prompts))
    return _per_head(block, keys, block.k_norm), values


def _block(block: FrozenBlock, lanes: Sequence[Lane], index: int) -> None:
    """One pre-norm block over all lanes, in place of their x."""
    flat = _flatten([lane.x for lane in lanes])  # [ΣB·N, D]
    parts = (_split(part, lanes) for part in block.qkv(block.norm1(flat)))  # queries, keys, values: [B, N, D] a lane
    mixed = _flatten([_attention(block, qkv, lane, index) for *qkv, lane in zip(*parts, lanes, strict=True)])
    flat = flat + block.ls1(block.project(mixed))
    flat = flat + block.ls2(block.mlp(block.norm2(flat)))
    for lane, x in zip(lanes, _split(flat, lanes), strict=True):
        lane.x = x


def _last_block(block: FrozenBlock, lanes: Sequence[Lane], index: int) -> Tensor:
    """The last block for the class token only: keys and values of all tokens, one query. Returns [ΣB, D]."""
    normed = block.norm1(_flatten([lane.x for lane in lanes]))
    keys, values = (_split(part, lanes) for part in block.keys_values(normed))
    firsts = [lane.x[:, 0] for lane in lanes]
    queries = block.query(_flatten([part[:, 0] for part in _split(normed, lanes)]))
    mixed = [
        _attention(block, (query.unsqueeze(1), *own), lane, index).squeeze(1)
        for query, *own, lane in zip(queries.split([len(x) for x in firsts]), keys, values, lanes, strict=True)
    ]
    flat = torch.cat(firsts) + block.ls1(block.project(torch.cat(mixed)))
    return flat + block.ls2(block.mlp(block.norm2(flat)))


def _attention(block: FrozenBlock, qkv: Sequence[Tensor], lane: Lane, index: int) -> Tensor:
    """Queries [B, Q, D] over the lane's own keys and values [B, N, D] and its prefix → [B, Q, D]."""
    query, keys, values = qkv
    query, keys = _per_head(block, query, block.q_norm), _per_head(block, keys, block.k_norm)
    prefix = lane.condition.prefix(index)
    mask = _mask(lane, prefix, keys)
    if prefix is not None:
        keys = torch.cat((prefix.keys.to(keys.dtype), keys), dim=1)
        values = torch.cat((prefix.values.to(values.dtype), values), dim=1)
    return block.attend(query, keys, values, mask)


def _mask(lane: Lane, prefix: Prefix | None, keys: Tensor) -> Tensor | None:
    """[B, 1, 1, P + N], True where a key may be seen. Padding without a mask would change answers: a zero key still
    takes its share of the softmax."""
    prefix_mask = None if prefix is None else prefix.mask
    if prefix_mask is None and lane.token_mask is None:
        return None
    parts = []
    if prefix is not None:
        parts.append(prefix_mask if prefix_mask is not None else _all(keys, prefix.keys.shape[1]))
    parts.append(lane.token_mask if lane.token_mask is not None else _all(keys, keys.shape[1]))
    return torch.cat(parts, dim=1)[:, None, None]


def _all(like: Tensor, length: int) -> Tensor:
    return torch.ones(like.shape[0], length, dtype=torch.bool, device=like.device)


def _pool_class_token(backbone: Backbone, x: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
    model = backbone.model
    return list(model.fc_norm(model.norm(x)).split([len(lane.x) for lane in lanes]))


def _pool_average(backbone: Backbone, x: Tensor) -> Tensor:
    """Mean over the patches' tokens, without class token, registers and prompts."""
    model, spec = backbone.model, backbone.spec
    return model.fc_norm(model.norm(x[:, spec.prefix_tokens : spec.tokens]).mean(dim=1))


def _per_head(block: FrozenBlock, x: Tensor, norm: nn.Module) -> Tensor:
    """The block's query or key norm, which works on each head by itself (identity in most backbones)."""
    if isinstance(norm, nn.Identity):
        return x
    return norm(x.unflatten(-1, (block.heads, -1))).flatten(-2)


def _flatten(parts: Sequence[Tensor]) -> Tensor:
    """[B_i, N_i, D] of each lane → [ΣB·N, D]; one lane costs no copy."""
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _split(flat: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
    """The inverse of `_flatten`: views, no copies."""
    shapes = [lane.x.shape[:2] for lane in lanes]
    parts = flat.split([rows * tokens for rows, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]
