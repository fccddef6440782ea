"""Where the network looked: the literal forward of one row, with its attention kept.

Slow and obviously right, as `reference.py` is, but of a lens rather than of a method's parameters: every softmax is
written out, every token's query is computed in every block, nothing is packed or fused. The features that come out are
tested equal to the fast forward's.

    last      what the pooled feature reads in the last block: the class token's attention, the mean over its heads
    rollout   attention followed through all blocks, half of each block being the residual path (Abnar & Zuidema,
              Quantifying Attention Flow in Transformers, ACL 2020, section 3)

A backbone that pools by averaging has no such reader: there the patches' own attention is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from . import vit
from .backbone import Backbone, Spec
from .engine import Engine, Pixels, normalise
from .lens import Condition, Prefix
from .residency import Seat


@dataclass(frozen=True)
class Looked:
    """Shares that add up to 1: of each patch, `grid` [h, w]; of the prompts; of the class token and registers."""

    grid: NDArray[np.float64]
    prompts: float
    rest: float


@dataclass(frozen=True)
class Attention:
    """`features` [D] are the pooled ones, so that somebody can check whose attention this is."""

    last: Looked
    rollout: Looked
    features: NDArray[np.float64]


@torch.inference_mode()
def look(engine: Engine, pixels: Pixels, seat: Seat) -> Attention:
    """What the seat's lens makes of one picture, uint8 [S, S, 3]. Runs in the engine's thread, as `Engine.run` does."""
    backbone = engine.backbone
    stack = torch.from_numpy(pixels[None]).to(backbone.device)
    mean, std = (torch.tensor([each], device=backbone.device) for each in (seat.mean, seat.std))
    x = vit.embed(backbone, normalise(stack, mean, std, backbone.dtype))
    return trace(backbone, x, engine.rack.gather([seat.place]))


def trace(backbone: Backbone, x: Tensor, condition: Condition) -> Attention:
    """Image tokens x [1, N, D] that enter the first block, under a condition of one row without padding."""
    spec = backbone.spec
    if condition.tokens is not None:
        x = torch.cat((x, condition.tokens), dim=1)  # [1, N + T, D]
    flow = Flow.at_start(x.shape[1])
    last = flow
    for index, block in enumerate(backbone.model.blocks):
        x, shares = _block(block, x, condition.prefix(index))
        last = Flow.of(shares)
        flow = flow.through(last)
    return Attention(_looked(last, spec), _looked(flow, spec), _pooled(backbone, x))


@dataclass(frozen=True)
class Flow:
    """Where each token's content comes from: `tokens` [M, M], from each token; `prefix` [M], from the prefix. Rows add
    up to 1."""

    tokens: Tensor
    prefix: Tensor

    @classmethod
    def at_start(cls, tokens: int) -> Flow:
        return cls(torch.eye(tokens, dtype=torch.float64), torch.zeros(tokens, dtype=torch.float64))

    @classmethod
    def of(cls, shares: Tensor) -> Flow:
        """One block's attention alone. shares: [M, P + M], the prefix first."""
        prefix = shares.shape[1] - shares.shape[0]
        return cls(shares[:, prefix:], shares[:, :prefix].sum(1))

    def through(self, block: Flow) -> Flow:
        """One block later: half attention, half residual. A prefix is fresh in each block, so nothing flows into it."""
        mix = 0.5 * block.tokens + 0.5 * torch.eye(len(self.prefix), dtype=torch.float64)
        return Flow(mix @ self.tokens, mix @ self.prefix + 0.5 * block.prefix)


def _block(block: Block, x: Tensor, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
    """One pre-norm block. x [1, M, D] → what it becomes, and each token's shares [M, P + M], averaged over heads."""
    attention = block.attn
    query, keys, values = attention.qkv(block.norm1(x)).chunk(3, dim=-1)
    query, keys = (
        _normed(query, attention.q_norm, attention.num_heads),
        _normed(keys, attention.k_norm, attention.num_heads),
    )
    if prefix is not None:
        keys = torch.cat((prefix.keys.to(keys.dtype), keys), dim=1)
        values = torch.cat((prefix.values.to(values.dtype), values), dim=1)
    query, keys, values = (_heads(part, attention.num_heads) for part in (query, keys, values))
    shares = (query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)  # [1, H, M, P + M]
    mixed = (shares @ values).transpose(1, 2).flatten(2)  # [1, M, D]
    x = x + block.ls1(attention.proj(mixed))
    x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, shares[0].mean(0).double().cpu()


def _normed(x: Tensor, norm: nn.Module, heads: int) -> Tensor:
    """Query and key norms work on each head by itself; a prefix comes normed, as the lens holds it."""
    return norm(x.unflatten(-1, (heads, -1))).flatten(-2)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [1, N, D] → [1, H, N, d]


def _looked(flow: Flow, spec: Spec) -> Looked:
    """What the pooled feature reads: the class token's row, or the mean of the patches' rows."""
    patches = slice(spec.prefix_tokens, spec.tokens)
    read = slice(0, 1) if spec.pool == "token" else patches
    tokens, prefix = flow.tokens[read].mean(0), flow.prefix[read].mean()
    side = spec.image_size // spec.patch_size
    prompts = float(prefix + tokens[spec.tokens :].sum())
    return Looked(tokens[patches].view(side, side).numpy(), prompts, float(tokens[: spec.prefix_tokens].sum()))


def _pooled(backbone: Backbone, x: Tensor) -> NDArray[np.float64]:
    model, spec = backbone.model, backbone.spec
    x = model.norm(x[:, : spec.tokens])
    pooled = x[:, 0] if spec.pool == "token" else x[:, spec.prefix_tokens :].mean(dim=1)
    return model.fc_norm(pooled)[0].double().cpu().numpy()
