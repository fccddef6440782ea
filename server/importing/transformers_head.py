"""A classifier on the frozen feature as transformers names it, `classifier.weight` [C, D] and `classifier.bias` [C]:
alone, or in a whole ViTForImageClassification, whose backbone must then be the running one.

Its layers are called `encoder.layer.3.attention.attention.query`, since version 5 `layers.3.attention.q_proj`. Its
norms have an epsilon of 1e-12, timm's 1e-6: answers differ in the sixth digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .checkpoint import Checkpoint
from .format import HALVES, BackboneShape, Format, ReadParameters, frozen, head, refuse_others

_TOPS: Final = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_NORMS: Final = {"norm1": ["layernorm_before"], "norm2": ["layernorm_after"]}
_SITES: Final[Mapping[str, Mapping[str, list[str]]]] = {  # by how the names of layers begin
    "encoder.layer": {
        **_NORMS,
        "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
        "attn.proj": ["attention.output.dense"],
        "mlp.fc1": ["intermediate.dense"],
        "mlp.fc2": ["output.dense"],
    },
    "layers": {
        **_NORMS,
        "attn.qkv": [f"attention.{part}_proj" for part in "qkv"],
        "attn.proj": ["attention.o_proj"],
        "mlp.fc1": ["mlp.fc1"],
        "mlp.fc2": ["mlp.fc2"],
    },
}


def recognises(checkpoint: Checkpoint) -> bool:
    return "classifier.weight" in checkpoint.arrays


def read(checkpoint: Checkpoint, shape: BackboneShape) -> ReadParameters:
    old = any(name.startswith("encoder.layer.") for name in checkpoint.arrays)
    layers = "encoder.layer" if old else "layers"

    def sources(name: str) -> list[str]:
        return [name] if name in checkpoint.arrays else _names(name, layers)

    known = {source for name in shape.names for source in sources(name)}
    refuse_others(checkpoint, {*known, "classifier.weight", "classifier.bias"})
    readers = frozen(checkpoint, shape, sources)
    return ReadParameters("linear", (0,) * shape.depth, head(checkpoint, shape), HALVES, readers)


def _names(name: str, layers: str) -> list[str]:
    """The names of the arrays that make up timm's `name`; empty where there are none."""
    if name in _TOPS:
        return [_TOPS[name]]
    module, _, leaf = name.rpartition(".")
    if module in _TOPS:
        return [f"{_TOPS[module]}.{leaf}"]
    block, _, site = module.removeprefix("blocks.").partition(".")
    return [f"{layers}.{block}.{each}.{leaf}" for each in _SITES[layers].get(site, [])]


FORMAT = Format(
    "transformers",
    "a classifier of transformers: classifier.weight and classifier.bias, alone or in a whole ViT",
    recognises,
    read,
)
