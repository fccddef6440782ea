"""Which timm models the one forward of `vit.py` equals, and why it does not equal the others.

A model is accepted for its structure, not for its name: each check names the attribute, the expected value and the
actual one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from timm.layers import AttentionPoolLatent, GluMlp, Mlp
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from .spec import Pool

MODELS = (VisionTransformer, VisionTransformerDistilled)
MLPS = (Mlp, GluMlp)
# timm's names → ours
GLOBAL_POOLS: Final[Mapping[str, Pool]] = {"token": "cls", "avg": "image", "map": "attention"}


def incompatibility(model: nn.Module) -> str | None:
    """Return why this model's forward is not the plain ViT forward of `vit.py`; None if it is."""
    return next(_reasons(model), None)


def _reasons(model: nn.Module) -> Iterator[str]:
    if not isinstance(model, VisionTransformer) or type(model) not in MODELS:
        yield _unlike("type", _names(MODELS), type(model).__name__)
        return
    if model.global_pool not in GLOBAL_POOLS:
        yield _unlike("global_pool", " or ".join(GLOBAL_POOLS), repr(model.global_pool))
    if model.attn_pool is not None and type(model.attn_pool) is not AttentionPoolLatent:
        yield _unlike("attn_pool", AttentionPoolLatent.__name__, type(model.attn_pool).__name__)
    if model.pool_include_prefix:
        yield _unlike("pool_include_prefix", "False", "True")
    height, width = model.patch_embed.img_size
    if height != width:
        yield _unlike("patch_embed.img_size", "a square", f"{height}×{width}")
    for index, block in enumerate(model.blocks):
        yield from (f"blocks.{index}{reason}" for reason in _block_reasons(block))


def _block_reasons(block: Any) -> Iterator[str]:
    if type(block) is not Block:
        yield _unlike("", Block.__name__, type(block).__name__)
        return
    attention, mlp = block.attn, block.mlp
    if type(mlp) not in MLPS:
        yield _unlike(".mlp", _names(MLPS), type(mlp).__name__)
    if type(attention) is not Attention:
        yield _unlike(".attn", Attention.__name__, type(attention).__name__)
        return
    if not isinstance(attention.norm, nn.Identity):
        yield _unlike(".attn.norm", "Identity", type(attention.norm).__name__)
    if (gate := getattr(attention, "gate", None)) is not None:  # absent in the oldest timm version that we support
        yield _unlike(".attn.gate", "None", type(gate).__name__)
    if attention.qkv.out_features != 3 * attention.qkv.in_features:
        yield _unlike(".attn.qkv", f"{3 * attention.qkv.in_features} features", f"{attention.qkv.out_features}")


def _unlike(attribute: str, expected: str, actual: str) -> str:
    return f"{attribute}: expected {expected}, got {actual}"


def _names(types: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in types)
