"""CVPT's parameters (Huang et al., ICCV 2025) as in its model's state dict: `Prompt_Tokens` [L, p, D], `head.*`.

The official script saves nothing, so this is what `torch.save(model.state_dict(), …)` writes. The weights of its
cross-attention are frozen copies of the blocks' attention; a checkpoint where they were trained as well is refused.
"""

from __future__ import annotations

import numpy as np

from .checkpoint import Checkpoint
from .format import IMAGENET, BackboneShape, Format, ReadParameters, frozen, head, prompts
from .refusal import refusal

PREPROCESS = {**IMAGENET, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


def recognises(checkpoint: Checkpoint) -> bool:
    return "Prompt_Tokens" in checkpoint.arrays


def read(checkpoint: Checkpoint, shape: BackboneShape) -> ReadParameters:
    _, _, rows = prompts("Prompt_Tokens", checkpoint.floats("Prompt_Tokens"), shape)
    lengths = (len(rows) // shape.depth,) * shape.depth
    if checkpoint.arrays["Prompt_Tokens"].shape[0] != shape.depth:
        raise refusal(f"Prompt_Tokens: expected prompts of all {shape.depth} layers, got one layer's")
    for layer in range(shape.depth):
        _check_copies(checkpoint, layer)
    return ReadParameters(
        "cvpt", lengths, {"prompts": rows, **head(checkpoint, shape)}, PREPROCESS, frozen(checkpoint, shape)
    )


def _check_copies(checkpoint: Checkpoint, layer: int) -> None:
    """Refuse a block whose cross-attention weights differ from its self-attention's, where the file has both."""
    block = f"blocks.{layer}"
    for leaf in ("weight", "bias"):
        names = [f"{block}.CrossAttn.{site}.{leaf}" for site in ("q", "k", "v", "proj")]
        sources = [f"{block}.attn.qkv.{leaf}", f"{block}.attn.proj.{leaf}"]
        if not all(name in checkpoint.arrays for name in (*names, *sources)):
            continue
        copies, originals = (np.concatenate([checkpoint.floats(name) for name in group]) for group in (names, sources))
        if not np.array_equal(copies, originals):
            raise refusal(f"{block}.CrossAttn: expected the block's own attention weights, got other, trained ones")


FORMAT = Format("cvpt", "a state dict of CVPT's model", recognises, read)
