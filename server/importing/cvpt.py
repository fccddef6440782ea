"""CVPT's parameters (Huang et al., ICCV 2025) as its model's state dict has them: `Prompt_Tokens` [L, p, D], `head.*`.

The official script saves nothing, so this is what `torch.save(model.state_dict(), …)` makes of its model. The weights
of its cross-attention are frozen copies of the blocks' own; a checkpoint where they were trained as well is refused.
"""

from __future__ import annotations

import numpy as np

from .checkpoint import Checkpoint
from .format import IMAGENET, Format, ReadParameters, Width, frozen, head, prompts
from .refusal import refused

PREPROCESS = {**IMAGENET, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


def recognises(checkpoint: Checkpoint) -> bool:
    return "Prompt_Tokens" in checkpoint.arrays


def read(checkpoint: Checkpoint, width: Width) -> ReadParameters:
    _, _, rows = prompts("Prompt_Tokens", checkpoint.floats("Prompt_Tokens"), width)
    lengths = (len(rows) // width.depth,) * width.depth
    if checkpoint.arrays["Prompt_Tokens"].shape[0] != width.depth:
        raise refused(f"Prompt_Tokens: expected prompts of all {width.depth} layers, got one layer's")
    for layer in range(width.depth):
        _check_copies(checkpoint, layer)
    return ReadParameters(
        "cvpt", lengths, {"prompts": rows, **head(checkpoint, width, "head")}, PREPROCESS, frozen(checkpoint, width)
    )


def _check_copies(checkpoint: Checkpoint, layer: int) -> None:
    """Where the file holds both, the cross-attention's weights must be the self-attention's."""
    own = f"blocks.{layer}"
    for leaf in ("weight", "bias"):
        names = [f"{own}.CrossAttn.{site}.{leaf}" for site in ("q", "k", "v", "proj")]
        sources = [f"{own}.attn.qkv.{leaf}", f"{own}.attn.proj.{leaf}"]
        if not all(name in checkpoint.arrays for name in (*names, *sources)):
            continue
        copies, originals = (np.concatenate([checkpoint.floats(name) for name in some]) for some in (names, sources))
        if not np.array_equal(copies, originals):
            raise refused(f"{own}.CrossAttn: expected the block's own attention weights, got others that were trained")


FORMAT = Format("cvpt", "a state dict of CVPT's model", recognises, read)
