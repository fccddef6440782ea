"""The one forward, for serving and for training.

    pixels ──embed──► x [B, N, D] ──12 blocks──► features [B, D] ──head──► logits [B, C]

Rows of one batch may belong to different tasks and methods. They are laid out in lanes: a lane is a group of rows with
the same number of tokens. Everything that treats each token separately (norms, projections, MLP) runs once over the
tokens of all lanes; only the attention runs lane by lane, and what rows bring besides a prefix (`additions.py`) is
added to the lanes that bring it. Readers (`reader.py`) are a lane of their own behind the lane of the trunk they read.

Why a prefix is exact: a method that discards its prompts' outputs at every layer (VPT-deep, Jia et al., ECCV 2022,
section 3.2) reaches the image tokens through keys and values only, K_l = W_k·LN_l(P_l) + b_k and likewise V_l. These do
not depend on the image, so they are computed once, when the lens is made (`project`), and the queries and the MLP run
for the image tokens alone. The last block computes no more than the head's pooling reads (`pooling.py`): for the class
token, one query alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pooling
from .additions import Additions
from .backbone import Backbone
from .block import FrozenBlock
from .lens import Condition, Lens, Plain, Prefix
from .reader import LiveTrunk, Reads, Recorded, hidden_tokens, stand_in
from .spec import Pool, Spec

Shape = tuple[int, int]  # rows and tokens of a lane
LaneAdditions = Sequence[Additions | None]  # one entry per lane


@dataclass
class Lane:
    """Rows with the same number of tokens. x: [B, N, D], the image's tokens that enter block `start`; the condition's
    tokens are appended at the layer where they enter. `live_trunk`: where the lane stores its keys and values for
    readers; `reads`: the trunk that the lane's readers read."""

    x: Tensor
    condition: Condition
    token_mask: Tensor | None = None  # [B, N], False at padding
    start: int = 0
    live_trunk: LiveTrunk | None = None
    reads: Reads | None = None

    @classmethod
    def of(cls, x: Tensor, condition: Condition, start: int = 0) -> Lane:
        """A lane of image tokens. If the condition brings nothing before layer `start`, x may be `tokens_at` of that
        layer."""
        return cls(x, condition, start=start)

    def enter(self, layer: int) -> None:
        """Append the condition's tokens if they enter here. Their position does not matter: prompts get no position
        embedding, and attention does not depend on the order."""
        tokens, mask = self.condition.tokens, self.condition.token_mask
        if tokens is None or layer != self.condition.enters or self.reads is not None:  # readers get theirs in `_start`
            return
        if mask is not None:
            self.token_mask = torch.cat((mask.new_ones(self.x.shape[:2]), mask), dim=1)
        self.x = torch.cat((self.x, tokens), dim=1)

    def pool(self, spec: Spec) -> Pool:
        return "reader" if self.reads is not None else self.condition.pool or spec.pool

    @classmethod
    def reading(cls, condition: Condition, reads: Reads) -> Lane:
        """Readers [R]; the lane of a live trunk must come before theirs. Their x is set when the forward reaches the
        layer where they start."""
        assert condition.reads_from is not None
        mask = condition.token_mask
        if mask is not None:
            mask = torch.cat((mask.new_ones(len(mask), 1), mask), dim=1)
        return cls(torch.empty(0), condition, mask, condition.reads_from, reads=reads)


def embed(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Normalised pixels [B, 3, S, S] to the tokens that enter the first block [B, N, D]."""
    model = backbone.model
    return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))


def forward(backbone: Backbone, x: Tensor, condition: Condition) -> Tensor:
    """Image tokens [B, N, D] of rows in one lane, or of one reader each, to pooled features [B, D]."""
    return forward_lanes(backbone, lanes_of(backbone, x, condition))[-1]


def lanes_of(backbone: Backbone, x: Tensor, condition: Condition, start: int = 0) -> list[Lane]:
    """The lanes of these rows; the last lane's features are the rows'. x: as in `Lane.of`."""
    if condition.reads_from is None:
        return [Lane.of(x, condition, start)]
    live_trunk = LiveTrunk(hidden_tokens(backbone.spec))
    return [Lane(x, Plain(), None, live_trunk=live_trunk), Lane.reading(condition, Reads(live_trunk))]


def forward_lanes(backbone: Backbone, lanes: Sequence[Lane]) -> list[Tensor]:
    """Pooled features [B_i, D] of each lane."""
    *blocks, last = backbone.blocks
    for lane in lanes:
        _enter(lane, backbone.spec)
    for index, block in enumerate(blocks):
        _start(lanes, backbone.spec, index)
        if entered := [lane for lane in lanes if lane.start <= index]:
            _block(block, entered, index)
    _start(lanes, backbone.spec, len(blocks))
    return _pooled(backbone, last, lanes)


def patches(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Normalised pixels [B, 3, S, S] to patch embeddings [B, patches, D]: `embed` without position, class token and
    registers."""
    model = backbone.model
    return model.norm_pre(model.patch_embed(pixels))


def tokens_at(backbone: Backbone, x: Tensor, layer: int, start: int = 0) -> Tensor:
    """Image tokens x [B, N, D] that enter block `start`, advanced through the plain backbone to the input of block
    `layer`."""
    lane = Lane.of(x, Plain())
    for index in range(start, layer):
        _block(backbone.blocks[index], [lane], index)
    return lane.x


@torch.no_grad()
def record(backbone: Backbone, x: Tensor, start: int) -> Recorded:
    """The trunk for readers that start at block `start`. x: [n, N, D], the image tokens that enter the first block."""
    spec, live_trunk = backbone.spec, LiveTrunk(hidden_tokens(backbone.spec))
    lane, first, read = Lane(x, Plain(), None, live_trunk=live_trunk), x[:, 0], []
    for index, block in enumerate(backbone.blocks):
        if index == start:
            first = stand_in(spec, lane.x).clone()
        if index < spec.depth - 1:
            _block(block, [lane], index)
        else:
            live_trunk.put(*project(block, lane.x))
        if index >= start:
            read.append([part.contiguous() for part in live_trunk.keys_values(index)])
    keys, values = zip(*read, strict=True)
    return Recorded(start, first, keys, values)


def head(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features [B, D], one head [C, D] and [C] → logits [B, C]."""
    return F.linear(features, weight, bias)


def classify(features: Tensor, lens: Lens) -> Tensor:
    """Features [B, D] → logits [B, C], through the lens's hidden layers if it has any."""
    for layer in lens.hidden:
        features = F.relu(F.linear(features, layer.weight, layer.bias))
    return head(features, lens.head_weight, lens.head_bias)


def project(block: FrozenBlock, prompts: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prompts [..., p, D] of one layer to the keys and values [..., p, D] that the layer's attention uses. `shift`
    [2·D]: what a task adds to the biases of both."""
    keys, values = block.prompts(block.norm1(prompts))
    if shift is not None:
        to_keys, to_values = shift.chunk(2, dim=-1)
        keys, values = keys + to_keys, values + to_values
    return block.per_head(keys, block.k_norm), values


def _enter(lane: Lane, spec: Spec) -> None:
    """Add the entry vectors that rows bring to their image tokens: one for class token and registers, one for
    patches."""
    entry = lane.condition.entry
    if entry is not None:
        others, patches = (entry[..., kind : kind + 1, :] for kind in (0, 1))
        counts = (spec.prefix_tokens, spec.tokens - spec.prefix_tokens)
        spread = (vector.expand(*vector.shape[:-2], n, -1) for vector, n in zip((others, patches), counts, strict=True))
        lane.x = lane.x + torch.cat(tuple(spread), dim=-2)  # [N, D] or [B, N, D]


def _start(lanes: Sequence[Lane], spec: Spec, index: int) -> None:
    """Initialise readers that start at block `index`: the trunk's state at this block, and their carried tokens."""
    starting = [lane for lane in lanes if lane.reads is not None and lane.start == index]
    if starting:
        for lane in lanes:
            if lane.live_trunk is not None:
                lane.live_trunk.first = stand_in(spec, lane.x)
    for lane in starting:
        assert lane.reads is not None
        lane.x = lane.reads.start(lane.condition.tokens)


def _block(block: FrozenBlock, lanes: Sequence[Lane], index: int) -> None:
    """One pre-norm block over all lanes; replaces their x."""
    additions, shapes = _additions_at(lanes, index)
    flat = _flatten([lane.x for lane in lanes])  # [ΣB·N, D]
    normed = block.norm1(flat)
    parts = (_split(part, shapes) for part in (normed, *block.qkv(normed)))  # each [B, N, D] a lane
    mixed = [
        _attention(block, lane, addition, part, index)
        for lane, addition, *part in zip(lanes, additions, *parts, strict=True)
    ]
    flat = _behind_attention(block, flat, _flatten(mixed), shapes, additions)
    for lane, x in zip(lanes, _split(flat, shapes), strict=True):
        lane.x = x


def _pooled(backbone: Backbone, last: FrozenBlock, lanes: Sequence[Lane]) -> list[Tensor]:
    """The last block, the norm and the pooling: features [B_i, D] of each lane."""
    pools = [lane.pool(backbone.spec) for lane in lanes]
    flat, shapes = _last_block(last, lanes, backbone.spec, pools)
    x = _split(backbone.model.norm(flat), shapes)
    pooled = pooling.features(backbone, x, pools, [lane.token_mask for lane in lanes])
    return [pooled] if len(lanes) == 1 else list(pooled.split([len(lane.x) for lane in lanes]))


def _last_block(
    block: FrozenBlock, lanes: Sequence[Lane], spec: Spec, pools: Sequence[Pool]
) -> tuple[Tensor, list[Shape]]:
    """The last block, with queries only for the first tokens of each lane that its pooling reads, and keys and values
    of all tokens. Returns [ΣB·Q, D] and each lane's rows and Q."""
    index = spec.depth - 1
    additions, shapes = _additions_at(lanes, index)
    read = [(rows, pooling.reads(pool, spec, n)) for pool, (rows, n) in zip(pools, shapes, strict=True)]
    flat = block.norm1(_flatten([lane.x for lane in lanes]))
    normed, keys, values = (_split(part, shapes) for part in (flat, *block.keys_values(flat)))
    queries = _split(block.query(_first(normed, read)), read)
    mixed = [
        _attention(block, lane, addition, part, index)
        for lane, addition, *part in zip(lanes, additions, normed, queries, keys, values, strict=True)
    ]
    flat = _first([lane.x for lane in lanes], read)
    return _behind_attention(block, flat, _flatten(mixed), read, additions), read


def _additions_at(lanes: Sequence[Lane], index: int) -> tuple[LaneAdditions, list[Shape]]:
    """Each lane's additions to block `index`, and its shape there, including tokens that enter at this block."""
    for lane in lanes:
        lane.enter(index)
    return [lane.condition.additions(index) for lane in lanes], [_shape(lane.x) for lane in lanes]


def _first(parts: Sequence[Tensor], read: Sequence[Shape]) -> Tensor:
    """The first Q tokens of each lane's [B, N, D] → [ΣB·Q, D]."""
    return _flatten([part[:, :tokens] for part, (_, tokens) in zip(parts, read, strict=True)])


def _behind_attention(
    block: FrozenBlock, flat: Tensor, mixed: Tensor, shapes: Sequence[Shape], additions: LaneAdditions
) -> Tensor:
    """The rest of a block, token by token: projection, MLP and the lanes' additions. flat, mixed: [ΣB·N, D]."""
    flat = block.after_attention(flat, mixed)
    for addition, x in _lane_parts(additions, shapes, flat):
        addition.after_attention(block, x)
    if all(addition is None for addition in additions):
        return block.after_mlp(flat)
    normed = block.norm2(flat)
    hidden = block.hidden(normed)
    for addition, part in _lane_parts(additions, shapes, hidden):
        addition.to_hidden(part)
    out = block.behind_hidden(hidden)
    flat = flat + block.ls2(out)
    for addition, x, *read in _lane_parts(additions, shapes, flat, normed, out):
        addition.after_mlp(block, x, *read)
    return flat


def _lane_parts(additions: LaneAdditions, shapes: Sequence[Shape], *flat: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each lane with additions: the additions and the lane's part [B, N, ·] of each flat tensor, a view that may be
    written to (autograd forbids writing to views from `split`)."""
    start = 0
    for addition, (rows, tokens) in zip(additions, shapes, strict=True):
        stop = start + rows * tokens
        if addition is not None:
            yield addition, *(part[start:stop].view(rows, tokens, -1) for part in flat)
        start = stop


def _attention(
    block: FrozenBlock, lane: Lane, additions: Additions | None, parts: Sequence[Tensor], index: int
) -> Tensor:
    """Queries [B, Q, D] of the lane's first tokens over its own keys and values [B, N, D] and its prefix → [B, Q, D].
    `parts`: the input of the products [B, N, D], then queries, keys and values."""
    normed, query, keys, values = parts
    if additions is not None:
        query, keys, values = additions.to_qkv(normed, query, keys, values)
    query, keys = block.per_head(query, block.q_norm), block.per_head(keys, block.k_norm)
    if lane.live_trunk is not None:
        lane.live_trunk.put(keys, values)
    prefix = lane.condition.prefix(index)
    mask = _mask(lane, prefix, keys)
    before = None if prefix is None else (prefix.keys.to(keys.dtype), prefix.values.to(values.dtype))
    if lane.reads is None:
        return block.attend(query, keys, values, mask, before)
    if before is not None:
        keys, values = (torch.cat(parts, dim=1) for parts in zip(before, (keys, values), strict=True))
    return lane.reads.attend(block, index, query, (keys, values), mask)


def _mask(lane: Lane, prefix: Prefix | None, keys: Tensor) -> Tensor | None:
    """[B, 1, 1, P + N], True where a key is visible. Padding without a mask would change answers: a zero key still
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


def _flatten(parts: Sequence[Tensor]) -> Tensor:
    """[B_i, N_i, D] of each lane → [ΣB·N, D]; one lane costs no copy."""
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _split(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The inverse of `_flatten`: views, no copies."""
    if len(shapes) == 1:
        return [flat.view(*shapes[0], -1)]
    parts = flat.split([rows * tokens for rows, tokens in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _shape(x: Tensor) -> Shape:
    return x.shape[0], x.shape[1]
