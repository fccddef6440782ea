"""Official VPT checkpoints (Jia et al., ECCV 2022; github.com/KMnP/vpt).

    prompt_ep*.pth   {"shallow_prompt": [1, p, D], "deep_prompt": [L-1, p, D]}, NumPy arrays and no head: the head comes
                     in a file of its own, as head.last_layer.weight or head.weight
    whole models     enc.transformer.prompt_embeddings, enc.transformer.deep_prompt_embeddings, head.last_layer.*

With PROMPT.PROJECT prompts have another width and pass a linear layer, `prompt_proj`, which is folded into them here.
The scripts resize to 256 pixels, crop 224, and normalise with ImageNet's mean and deviation, whatever the backbone was
pretrained with; on VTAB they squash instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .format import IMAGENET, BackboneShape, Format, ReadParameters, frozen, head, prompts
from .refusal import refusal

PREPROCESS = {**IMAGENET, "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
WHOLE = "enc.transformer."


def recognises(checkpoint: Checkpoint) -> bool:
    return "shallow_prompt" in checkpoint.arrays or any(name.startswith("enc.") for name in checkpoint.arrays)


def read(checkpoint: Checkpoint, shape: BackboneShape) -> ReadParameters:
    _refuse_others(checkpoint)
    whole = "shallow_prompt" not in checkpoint.arrays
    first, rest = (
        (f"{WHOLE}prompt_embeddings", f"{WHOLE}deep_prompt_embeddings") if whole else ("shallow_prompt", "deep_prompt")
    )
    stack = [checkpoint.floats(name) for name in (first, rest) if name == first or name in checkpoint.arrays]
    for name, array in zip((first, rest), stack, strict=False):
        if array.ndim != 3 or array.shape[1:] != stack[0].shape[1:]:
            raise refusal(f"{name}: expected [layers, p, width] with one p and width, got {list(array.shape)}")
    method, lengths, rows = prompts(first, _project(checkpoint, np.concatenate(stack), shape), shape)
    classifier = head(checkpoint, shape, "head.last_layer")
    return ReadParameters(
        method, lengths, {"prompts": rows, **classifier}, PREPROCESS, frozen(checkpoint, shape, _official_names)
    )


def _refuse_others(checkpoint: Checkpoint) -> None:
    """Refuse variants whose forward differs from ours."""
    names = checkpoint.arrays
    for marker, why in (
        ("enc.fc_norm.weight", "an MAE model pools over its prompts' outputs, which this forward does not compute"),
        ("enc.prompt_embeddings", "a MoCo, MAE or Swin model: expected enc.transformer.prompt_embeddings of a ViT"),
    ):
        if marker in names:
            raise refusal(f"{marker}: {why}")
    if hidden := sorted(name for name in names if name.startswith("head.projection.")):
        raise refusal(f"{hidden[0]}: a head with hidden layers behind prompts: expected a linear one")


def _project(checkpoint: Checkpoint, stack: NDArray[np.float32], shape: BackboneShape) -> NDArray[np.float32]:
    """Prompts [l, p, P] projected to [l, p, D]; unchanged where there is no projection."""
    name = next((n for n in (f"{WHOLE}prompt_proj", "prompt_proj") if f"{n}.weight" in checkpoint.arrays), None)
    if name is None:
        if stack.shape[2] != shape.dim:
            raise refusal(
                f"prompts are {stack.shape[2]} wide, the running backbone {shape.dim}: expected prompt_proj.weight "
                f"[{shape.dim}, {stack.shape[2]}] with them, in this file or another"
            )
        return stack
    weight, bias = checkpoint.floats(f"{name}.weight"), checkpoint.floats(f"{name}.bias")
    if weight.shape != (shape.dim, stack.shape[2]) or bias.shape != (shape.dim,):
        got = f"{list(weight.shape)} and {list(bias.shape)}"
        raise refusal(f"{name}: expected [{shape.dim}, {stack.shape[2]}] and [{shape.dim}], got {got}")
    wide = stack.astype(np.float64) @ weight.T.astype(np.float64) + bias
    return wide.astype(np.float32)


def _official_names(name: str) -> list[str]:
    """The official names of the arrays that make up timm's `name`; empty where there are none. Queries, keys and values
    are separate."""
    tops = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "encoder.encoder_norm",
    }
    if name in tops:
        return [f"{WHOLE}{tops[name]}"]
    module, _, leaf = name.rpartition(".")
    if module in tops:
        return [f"{WHOLE}{tops[module]}.{leaf}"]
    block, _, site = module.removeprefix("blocks.").partition(".")
    sites = {
        "norm1": ["attention_norm"],
        "norm2": ["ffn_norm"],
        "mlp.fc1": ["ffn.fc1"],
        "mlp.fc2": ["ffn.fc2"],
        "attn.proj": ["attn.out"],
        "attn.qkv": ["attn.query", "attn.key", "attn.value"],
    }
    return [f"{WHOLE}encoder.layer.{block}.{n}.{leaf}" for n in sites.get(site, [])]


FORMAT = Format("vpt", "official VPT: prompt_ep*.pth with a head, or a whole model", recognises, read)
