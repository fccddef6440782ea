"""Pooling: which of the last block's tokens a head reads.

    cls                the class token; for a distilled DeiT the mean of class and distillation token
    image              the mean of the patch tokens
    image_and_prompts  the mean of the patch tokens and of the last block's outputs for its prompts, as the official
                       VPT and SPT code pools for MAE
    attention          the backbone's own attention pooling (SigLIP), over the patch tokens
    reader             a reader's own first token (`reader.py`), whatever the backbone's pooling

The norms stand where the backbone has them: `norm` before the pool, `fc_norm` behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .spec import Pool

if TYPE_CHECKING:
    from .backbone import Backbone
    from .spec import Spec


def reads(pool: Pool, spec: Spec, tokens: int) -> int:
    """How many of a row's first `tokens` tokens this pooling reads; the last block computes no others."""
    if pool in ("cls", "reader"):
        return spec.class_tokens if pool == "cls" else 1
    return tokens if pool == "image_and_prompts" else spec.tokens


def features(backbone: Backbone, x: Sequence[Tensor], pools: Sequence[Pool], masks: Sequence[Tensor | None]) -> Tensor:
    """Normed tokens x [B_i, Q_i, D] of each lane, the outputs of the last block → pooled features [ΣB, D].

    masks: [B_i, N_i], False at padding tokens; None for a lane without padding.
    """
    pooled = [_pool(backbone, *lane) for lane in zip(x, pools, masks, strict=True)]
    normed: Tensor = backbone.model.fc_norm(pooled[0] if len(pooled) == 1 else torch.cat(pooled))
    return normed


def _pool(backbone: Backbone, x: Tensor, pool: Pool, mask: Tensor | None) -> Tensor:
    """[B, Q, D] → [B, D]"""
    spec = backbone.spec
    if pool in ("cls", "reader"):
        return x[:, 0] if x.shape[1] == 1 else x.mean(dim=1)
    patches = x[:, spec.prefix_tokens : reads(pool, spec, x.shape[1])]
    if pool == "attention":
        pooled: Tensor = backbone.model.attn_pool(patches)
        return pooled
    if mask is None or pool == "image":
        return patches.mean(dim=1)
    real = mask[:, spec.prefix_tokens :].unsqueeze(-1).to(x.dtype)  # [B, N, 1]
    return (patches * real).sum(dim=1) / real.sum(dim=1)
