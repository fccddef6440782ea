"""Where the network looked: the one forward of one row, with every softmax written out and kept.

    last      what the pooled feature reads in the last block: the class token's attention, the mean over its heads
    rollout   attention followed through all blocks, half of each block being the residual path (Abnar & Zuidema,
              Quantifying Attention Flow in Transformers, ACL 2020, section 3)

It is the forward that answers, so whatever a lens brings is in it. Prompts have a share where they stand in the block's
own softmax, as a prefix or as tokens; prompts with a softmax of their own take nothing from it. A head that reads more
than the class token has no single reader: there the attention of all tokens that it reads is averaged. Where the pooled
feature is a reader's (`reader.py`), it is the reader that is followed, through the trunk that it reads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from . import vit
from .backbone import Backbone
from .batch import Pixels, normalise
from .block import FrozenBlock
from .engine import Engine
from .lens import Condition
from .pooling import reads as tokens_read
from .reader import hidden_tokens
from .residency import Seat
from .spec import Pool, Spec


@dataclass(frozen=True)
class AttentionMap:
    """Shares that add up to 1: of each patch, `grid` [h, w]; of the prompts; of the class token and registers."""

    grid: NDArray[np.float64]
    prompts: float
    rest: float


@dataclass(frozen=True)
class AttentionMaps:
    """`features` [D] are the pooled ones, so that somebody can check whose attention this is."""

    last: AttentionMap
    rollout: AttentionMap
    features: NDArray[np.float64]


@torch.inference_mode()
def look(engine: Engine, pixels: Pixels, seat: Seat) -> AttentionMaps:
    """What the seat's lens makes of one picture, uint8 [S, S, 3]. Runs in the engine's thread, as `Engine.run` does."""
    backbone = engine.backbone
    stack = torch.from_numpy(pixels[None]).to(backbone.device)
    mean, std = (torch.tensor([each], device=backbone.device) for each in (seat.mean, seat.std))
    x = vit.embed(backbone, normalise(stack, mean, std, backbone.dtype))
    return trace(backbone, x, engine.rack.gather([seat.place]))


def trace(backbone: Backbone, x: Tensor, condition: Condition) -> AttentionMaps:
    """Image tokens x [1, N, D] that enter the first block, under a condition of one row."""
    watched = [RecordedBlock(block) for block in backbone.blocks]
    watching = copy.copy(backbone)  # the same weights; the blocks of the one that serves stay as they are
    watching.blocks = list(watched)
    features = vit.forward(watching, x, condition)
    if condition.reads_from is not None:
        return _trace_reader(backbone.spec, watched, features, condition.reads_from)
    carried = 0 if condition.tokens is None else condition.tokens.shape[1]
    flow = last = Flow.at_start(backbone.spec.tokens)
    for layer, block in enumerate(watched):
        if layer == condition.enters:
            flow = flow.with_fresh(carried)
        last = Flow.of(block.shares, flow.tokens.shape[1])
        flow = flow.through(last)
    at_last, in_all = (_looked(own, backbone.spec, condition.pool) for own in (last, flow))
    return AttentionMaps(at_last, in_all, features[0].double().cpu().numpy())


class RecordedBlock(FrozenBlock):
    """A block of the same weights that keeps its attention: `shares` [Q, P + M] of the one row, the prefix first, the
    mean over the heads."""

    shares: Tensor
    read: Tensor  # of the readers [Q, P + T + N], where there are any: prefix, their own tokens, the trunk's

    def __init__(self, block: FrozenBlock) -> None:
        self.__dict__.update(block.__dict__)

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        shares = scores.softmax(dim=-1)  # [1, H, Q, P + M]
        if "shares" not in self.__dict__:  # whatever attends after the block's own attention has a softmax of its own
            self.shares = shares[0].mean(0).double().cpu()
        return (shares @ values).transpose(1, 2).flatten(2)

    def softmax(self, scores: Tensor) -> Tensor:
        shares = super().softmax(scores)
        self.read = shares[0].mean(0).double().cpu()
        return shares


@dataclass(frozen=True)
class Flow:
    """Where each token's content comes from: `tokens` [Q, M], from each token; `prefix` [Q], from prefixes. Rows add
    up to 1. Q is M, or less where only the first tokens, which a head reads, are followed."""

    tokens: Tensor
    prefix: Tensor

    @classmethod
    def at_start(cls, tokens: int) -> Flow:
        return cls(torch.eye(tokens, dtype=torch.float64), torch.zeros(tokens, dtype=torch.float64))

    @classmethod
    def of(cls, shares: Tensor, tokens: int) -> Flow:
        """One block's attention alone. shares: [Q, P + M], the prefix first; `tokens` is M."""
        prefix = shares.shape[1] - tokens
        return cls(shares[:, prefix:], shares[:, :prefix].sum(1))

    def with_fresh(self, tokens: int) -> Flow:
        """So many tokens more, behind the others, that come from nowhere but themselves."""
        return Flow(torch.block_diag(self.tokens, torch.eye(tokens).double()), F.pad(self.prefix, (0, tokens)))

    def through(self, block: Flow) -> Flow:
        """One block later: half attention, half residual. A prefix is fresh in each block, so nothing flows into it."""
        mix = 0.5 * block.tokens + 0.5 * torch.eye(*block.tokens.shape, dtype=torch.float64)
        return Flow(mix @ self.tokens, mix @ self.prefix + 0.5 * block.prefix)


def _trace_reader(spec: Spec, watched: Sequence[RecordedBlock], features: Tensor, start: int) -> AttentionMaps:
    hidden, trunk = hidden_tokens(spec), Flow.at_start(spec.tokens)
    for block in watched[:start]:
        trunk = trunk.through(Flow.of(block.shares, spec.tokens))
    carried = watched[start].read.shape[0] - 1
    own = _reader_at_start(spec, trunk, carried)
    for block in watched[start:]:
        prefix, among, read = _shares_of(block, 1 + carried, spec.tokens - hidden)
        seen = F.pad(read @ trunk.tokens[hidden:], (0, carried))
        queries = len(among)  # in the last block CLS' alone
        own = Flow(
            0.5 * own.tokens[:queries] + 0.5 * (among @ own.tokens + seen),
            0.5 * own.prefix[:queries] + 0.5 * (prefix + among @ own.prefix),
        )
        trunk = trunk.through(Flow.of(block.shares, spec.tokens))
    last = Flow(torch.cat((F.pad(read, (hidden, 0)), among[:, 1:]), dim=1), prefix)
    return AttentionMaps(_looked_reader(last, spec), _looked_reader(own, spec), features[0].double().cpu().numpy())


def _reader_at_start(spec: Spec, trunk: Flow, carried: int) -> Flow:
    """[1 + T, N + T]: CLS' comes from where what it is a copy of comes from, a carried token from itself."""
    first = trunk.tokens[:1] if spec.pool == "cls" else trunk.tokens[spec.prefix_tokens :].mean(0, keepdim=True)
    return Flow(torch.block_diag(first, torch.eye(carried, dtype=torch.float64)), torch.zeros(1 + carried).double())


def _shares_of(block: RecordedBlock, own: int, trunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the readers' queries [Q]: to the prefix in all, to their own tokens [Q, T], to the trunk's [Q, N]."""
    prefix, among, read = block.read.split([block.read.shape[1] - own - trunk, own, trunk], dim=1)
    return prefix.sum(1), among, read


def _looked_reader(flow: Flow, spec: Spec) -> AttentionMap:
    """What a reader's first token reads. Flow's tokens: those of the image, then the carried ones."""
    tokens, side = flow.tokens[0], spec.image_size // spec.patch_size
    patches, prompts = tokens[spec.prefix_tokens : spec.tokens], float(flow.prefix[0] + tokens[spec.tokens :].sum())
    return AttentionMap(patches.view(side, side).numpy(), prompts, float(1 - patches.sum()) - prompts)


def _looked(flow: Flow, spec: Spec, pool: Pool | None) -> AttentionMap:
    """What the pooled feature reads: the mean over the rows of the tokens that the head reads."""
    first = 0 if (pool or spec.pool) == "cls" else spec.prefix_tokens
    stop = tokens_read(pool or spec.pool, spec, len(flow.tokens))
    tokens, prefix = flow.tokens[first:stop].mean(0), flow.prefix[first:stop].mean()
    patches = slice(spec.prefix_tokens, spec.tokens)
    side = spec.image_size // spec.patch_size
    prompts = float(prefix + tokens[spec.tokens :].sum())
    return AttentionMap(tokens[patches].view(side, side).numpy(), prompts, float(tokens[: spec.prefix_tokens].sum()))
