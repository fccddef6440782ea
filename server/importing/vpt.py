"""Official VPT checkpoints (Jia et al., ECCV 2022; github.com/KMnP/vpt).

    prompt_ep*.pth   {"shallow_prompt": [1, p, D], "deep_prompt": [L-1, p, D]}, NumPy arrays and no head: the head comes
                     in a file of its own, as head.last_layer.weight or head.weight
    whole models     enc.transformer.prompt_embeddings, enc.transformer.deep_prompt_embeddings, head.last_layer.*

With PROMPT.PROJECT prompts live in another width and pass a linear layer, `prompt_proj`: it is folded into them here.
Its scripts resize to 256 pixels and cut 224 out, and normalise with ImageNet's mean and deviation, whatever the
backbone was pretrained with; on VTAB they squash instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .format import IMAGENET, Format, ReadParameters, Width, head, prompts
from .refusal import refused

Read = Callable[[], NDArray[np.float32]]
PREPROCESS = {**IMAGENET, "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
WHOLE = "enc.transformer."


def recognises(checkpoint: Checkpoint) -> bool:
    return "shallow_prompt" in checkpoint.arrays or any(name.startswith("enc.") for name in checkpoint.arrays)


def read(checkpoint: Checkpoint, width: Width) -> ReadParameters:
    _refuse_others(checkpoint)
    whole = "shallow_prompt" not in checkpoint.arrays
    first, rest = (
        (f"{WHOLE}prompt_embeddings", f"{WHOLE}deep_prompt_embeddings") if whole else ("shallow_prompt", "deep_prompt")
    )
    stack = [checkpoint.floats(name) for name in (first, rest) if name == first or name in checkpoint.arrays]
    for name, array in zip((first, rest), stack, strict=False):
        if array.ndim != 3 or array.shape[1:] != stack[0].shape[1:]:
            raise refused(f"{name}: expected [layers, p, width] with one p and width, got {list(array.shape)}")
    method, lengths, rows = prompts(first, _folded(checkpoint, np.concatenate(stack), width), width)
    classifier = head(checkpoint, width, "head.last_layer", "head")
    return ReadParameters(method, lengths, {"prompts": rows, **classifier}, PREPROCESS, _frozen(checkpoint, width))


def _refuse_others(checkpoint: Checkpoint) -> None:
    """Variants whose answers the running forward would not give."""
    names = checkpoint.arrays
    for found, why in (
        ("enc.fc_norm.weight", "an MAE model pools over its prompts' outputs, which are thrown away here"),
        ("enc.prompt_embeddings", "a MoCo, MAE or Swin model: expected enc.transformer.prompt_embeddings of a ViT"),
    ):
        if found in names:
            raise refused(f"{found}: {why}")
    if hidden := sorted(name for name in names if name.startswith("head.projection.")):
        raise refused(f"{hidden[0]}: a head with hidden layers behind prompts: expected a linear one")


def _folded(checkpoint: Checkpoint, own: NDArray[np.float32], width: Width) -> NDArray[np.float32]:
    """Prompts [l, p, P] through the projection to [l, p, D], once and for all."""
    name = next((n for n in (f"{WHOLE}prompt_proj", "prompt_proj") if f"{n}.weight" in checkpoint.arrays), None)
    if name is None:
        if own.shape[2] != width.dim:
            raise refused(
                f"prompts are {own.shape[2]} wide, the running backbone {width.dim}: expected prompt_proj.weight "
                f"[{width.dim}, {own.shape[2]}] with them, in this file or another"
            )
        return own
    weight, bias = checkpoint.floats(f"{name}.weight"), checkpoint.floats(f"{name}.bias")
    if weight.shape != (width.dim, own.shape[2]) or bias.shape != (width.dim,):
        got = f"{list(weight.shape)} and {list(bias.shape)}"
        raise refused(f"{name}: expected [{width.dim}, {own.shape[2]}] and [{width.dim}], got {got}")
    wide = own.astype(np.float64) @ weight.T.astype(np.float64) + bias
    return wide.astype(np.float32)


def _frozen(checkpoint: Checkpoint, width: Width) -> dict[str, Read]:
    """The backbone as KMnP names it, under timm's names. Queries, keys and values are one product there."""
    return {name: own for name in width.names if (own := _reader(checkpoint, name)) is not None}


def _reader(checkpoint: Checkpoint, name: str) -> Read | None:
    sources = [f"{WHOLE}{own}" for own in _official(name)]
    if not sources or any(own not in checkpoint.arrays for own in sources):
        return None
    return lambda: np.concatenate([checkpoint.floats(own) for own in sources])


def _official(name: str) -> list[str]:
    """The official name or names of what timm calls `name`; none where there is no such thing."""
    tops = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "encoder.encoder_norm",
    }
    if name in tops:
        return [tops[name]]
    module, _, leaf = name.rpartition(".")
    if module in tops:
        return [f"{tops[module]}.{leaf}"]
    block, _, site = module.removeprefix("blocks.").partition(".")
    sites = {
        "norm1": ["attention_norm"],
        "norm2": ["ffn_norm"],
        "mlp.fc1": ["ffn.fc1"],
        "mlp.fc2": ["ffn.fc2"],
        "attn.proj": ["attn.out"],
        "attn.qkv": ["attn.query", "attn.key", "attn.value"],
    }
    return [f"encoder.layer.{block}.{own}.{leaf}" for own in sites.get(site, [])]


FORMAT = Format("vpt", "official VPT: prompt_ep*.pth with a head, or a whole model", recognises, read)
