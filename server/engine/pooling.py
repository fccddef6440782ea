"""What a head reads of the tokens that the last block gives.

    cls                the class token; of a distilled DeiT the mean of class and distillation token
    image              the mean of the patches' tokens
    image_and_prompts  the mean of the patches' tokens and of what the last block makes of its prompts, as the official
                       VPT and SPT code pool for MAE
    attention          the backbone's own attention pooling (SigLIP), over the patches' tokens
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
    """How many of the first of a row's `tokens` tokens this pooling looks at: the last block gives no others."""
    if pool in ("cls", "reader"):
        return spec.class_tokens if pool == "cls" else 1
    return tokens if pool == "image_and_prompts" else spec.tokens


def features(backbone: Backbone, x: Sequence[Tensor], pools: Sequence[Pool], masks: Sequence[Tensor | None]) -> Tensor:
    """Normed tokens x [B_i, Q_i, D] of each lane, what the last block gave, → pooled features [ΣB, D].

    masks: [B_i, N_i], False at tokens that are padding; None where none is.
    """
    pooled = [_pool(backbone, *own) for own in zip(x, pools, masks, strict=True)]
    found: Tensor = backbone.model.fc_norm(pooled[0] if len(pooled) == 1 else torch.cat(pooled))
    return found


def _pool(backbone: Backbone, x: Tensor, pool: Pool, mask: Tensor | None) -> Tensor:
    """[B, Q, D] → [B, D]"""
    spec = backbone.spec
    if pool in ("cls", "reader"):
        return x[:, 0] if x.shape[1] == 1 else x.mean(dim=1)
    patches = x[:, spec.prefix_tokens : reads(pool, spec, x.shape[1])]
    if pool == "attention":
        found: Tensor = backbone.model.attn_pool(patches)
        return found
    if mask is None or pool == "image":
        return patches.mean(dim=1)
    real = mask[:, spec.prefix_tokens :].unsqueeze(-1).to(x.dtype)  # [B, N, 1]
    return (patches * real).sum(dim=1) / real.sum(dim=1)
