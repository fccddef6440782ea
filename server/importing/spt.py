"""Official SPT checkpoints (Wang et al., Revisiting the Power of Prompt for Visual Tuning, ICML 2024).

`ckpt.pth` holds a whole timm model under `model`: `prompt_token` [L, p, D] (deep) or [1, p, D] (shallow), `head.*`,
and the frozen backbone. The paper does not evaluate the moving average beside it. The MAE variant has the same
names but pools over its prompts' outputs; nothing in the file distinguishes it, so the user has to know.
"""

from __future__ import annotations

from .checkpoint import Checkpoint
from .format import IMAGENET, BackboneShape, Format, ReadParameters, frozen, head, prompts

PREPROCESS = {**IMAGENET, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}


def recognises(checkpoint: Checkpoint) -> bool:
    return "prompt_token" in checkpoint.arrays


def read(checkpoint: Checkpoint, shape: BackboneShape) -> ReadParameters:
    method, lengths, rows = prompts("prompt_token", checkpoint.floats("prompt_token"), shape)
    params = {"prompts": rows, **head(checkpoint, shape)}
    return ReadParameters(method, lengths, params, PREPROCESS, frozen(checkpoint, shape))


FORMAT = Format("spt", "official SPT: ckpt.pth", recognises, read)
