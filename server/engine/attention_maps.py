"""Attention maps: the forward of one row, with every softmax computed explicitly and recorded.

    last      the attention that the pooled feature pays in the last block: the class token's, averaged over heads
    rollout   attention followed through all blocks, half of each block being the residual path (Abnar & Zuidema,
              Quantifying Attention Flow in Transformers, ACL 2020, section 3)

This is the forward that answers, so everything that a lens brings is included. Prompts have a share where they are in
the block's own softmax, as a prefix or as tokens; prompts with a softmax of their own take nothing from it. A head that
reads more than the class token has no single reader: the attention of all tokens that it reads is averaged. Where the
pooled feature is a reader's (`reader.py`), the reader is followed, through the trunk that it reads.
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
    """`features` [D] are the pooled ones, so that callers can check which forward this attention belongs to."""

    last: AttentionMap
    rollout: AttentionMap
    features: NDArray[np.float64]


@torch.inference_mode()
def look(engine: Engine, pixels: Pixels, seat: Seat) -> AttentionMaps:
    """Attention maps of the seat's lens on one picture, uint8 [S, S, 3]. Runs in the engine's thread, as `Engine.run`
    does."""
    backbone = engine.backbone
    stack = torch.from_numpy(pixels[None]).to(backbone.device)
    mean, std = (torch.tensor([each], device=backbone.device) for each in (seat.mean, seat.std))
    x = vit.embed(backbone, normalise(stack, mean, std, backbone.dtype))
    return trace(backbone, x, engine.rack.gather([seat.place]))


def trace(backbone: Backbone, x: Tensor, condition: Condition) -> AttentionMaps:
    """Attention maps for image tokens x [1, N, D] that enter the first block, under a condition of one row."""
    recorded = [RecordedBlock(block) for block in backbone.blocks]
    recording = copy.copy(backbone)  # the same weights; the serving backbone keeps its blocks
    recording.blocks = list(recorded)
    features = vit.forward(recording, x, condition)
    if condition.reads_from is not None:
        return _trace_readers(backbone.spec, recorded, features, condition.reads_from)
    carried = 0 if condition.tokens is None else condition.tokens.shape[1]
    flow = last = Flow.at_start(backbone.spec.tokens)
    for layer, block in enumerate(recorded):
        if layer == condition.enters:
            flow = flow.with_fresh(carried)
        last = Flow.of(block.shares, flow.tokens.shape[1])
        flow = flow.through(last)
    at_last, in_all = (_pooled_map(followed, backbone.spec, condition.pool) for followed in (last, flow))
    return AttentionMaps(at_last, in_all, features[0].double().cpu().numpy())


class RecordedBlock(FrozenBlock):
    """A block with the same weights that records its attention: `shares` [Q, P + M] of the one row, the prefix first,
    averaged over the heads."""

    shares: Tensor
    read: Tensor  # of the readers [Q, P + T + N], if there are any: prefix, their own tokens, the trunk's

    def __init__(self, block: FrozenBlock) -> None:
        self.__dict__.update(block.__dict__)

    def mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        shares = scores.softmax(dim=-1)  # [1, H, Q, P + M]
        if "shares" not in self.__dict__:  # a later attention in this block (`Cross`) has a softmax of its own
            self.shares = shares[0].mean(0).double().cpu()
        return (shares @ values).transpose(1, 2).flatten(2)

    def softmax(self, scores: Tensor) -> Tensor:
        shares = super().softmax(scores)
        self.read = shares[0].mean(0).double().cpu()
        return shares


@dataclass(frozen=True)
class Flow:
    """The origin of each token's content: `tokens` [Q, M], shares from each token; `prefix` [Q], from prefixes. Rows
    sum to 1. Q is M, or less if only the first tokens, which a head reads, are followed."""

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
        """Append `tokens` tokens whose content comes from themselves alone."""
        return Flow(torch.block_diag(self.tokens, torch.eye(tokens).double()), F.pad(self.prefix, (0, tokens)))

    def through(self, block: Flow) -> Flow:
        """The flow after one more block: half attention, half residual. A prefix is fresh in each block, so nothing
        flows into it."""
        mix = 0.5 * block.tokens + 0.5 * torch.eye(*block.tokens.shape, dtype=torch.float64)
        return Flow(mix @ self.tokens, mix @ self.prefix + 0.5 * block.prefix)


def _trace_readers(spec: Spec, recorded: Sequence[RecordedBlock], features: Tensor, start: int) -> AttentionMaps:
    hidden, trunk = hidden_tokens(spec), Flow.at_start(spec.tokens)
    for block in recorded[:start]:
        trunk = trunk.through(Flow.of(block.shares, spec.tokens))
    carried = recorded[start].read.shape[0] - 1
    reader = _reader_at_start(spec, trunk, carried)
    for block in recorded[start:]:
        prefix, among, read = _shares_of(block, 1 + carried, spec.tokens - hidden)
        seen = F.pad(read @ trunk.tokens[hidden:], (0, carried))
        queries = len(among)  # in the last block CLS' alone
        reader = Flow(
            0.5 * reader.tokens[:queries] + 0.5 * (among @ reader.tokens + seen),
            0.5 * reader.prefix[:queries] + 0.5 * (prefix + among @ reader.prefix),
        )
        trunk = trunk.through(Flow.of(block.shares, spec.tokens))
    last = Flow(torch.cat((F.pad(read, (hidden, 0)), among[:, 1:]), dim=1), prefix)
    return AttentionMaps(_reader_map(last, spec), _reader_map(reader, spec), features[0].double().cpu().numpy())


def _reader_at_start(spec: Spec, trunk: Flow, carried: int) -> Flow:
    """[1 + T, N + T]: CLS' has the origin of the state that it copies, a carried token comes from itself."""
    first = trunk.tokens[:1] if spec.pool == "cls" else trunk.tokens[spec.prefix_tokens :].mean(0, keepdim=True)
    return Flow(torch.block_diag(first, torch.eye(carried, dtype=torch.float64)), torch.zeros(1 + carried).double())


def _shares_of(block: RecordedBlock, reader_tokens: int, trunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of the readers' queries [Q]: to the prefix as a whole, to their own tokens [Q, T], to the trunk's [Q,
    N]."""
    prefix, among, read = block.read.split([block.read.shape[1] - reader_tokens - trunk, reader_tokens, trunk], dim=1)
    return prefix.sum(1), among, read


def _reader_map(flow: Flow, spec: Spec) -> AttentionMap:
    """The shares of a reader's first token. The flow's tokens: those of the image, then the carried ones."""
    tokens, side = flow.tokens[0], spec.image_size // spec.patch_size
    patches, prompts = tokens[spec.prefix_tokens : spec.tokens], float(flow.prefix[0] + tokens[spec.tokens :].sum())
    return AttentionMap(patches.view(side, side).numpy(), prompts, float(1 - patches.sum()) - prompts)


def _pooled_map(flow: Flow, spec: Spec, pool: Pool | None) -> AttentionMap:
    """The shares of the pooled feature: the mean over the tokens that the head reads."""
    first = 0 if (pool or spec.pool) == "cls" else spec.prefix_tokens
    stop = tokens_read(pool or spec.pool, spec, len(flow.tokens))
    tokens, prefix = flow.tokens[first:stop].mean(0), flow.prefix[first:stop].mean()
    patches = slice(spec.prefix_tokens, spec.tokens)
    side = spec.image_size // spec.patch_size
    prompts = float(prefix + tokens[spec.tokens :].sum())
    return AttentionMap(tokens[patches].view(side, side).numpy(), prompts, float(tokens[: spec.prefix_tokens].sum()))
