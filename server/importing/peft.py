"""LoRA adapters as Hugging Face's PEFT saves them for ViTs: adapter_config.json and adapter_model.safetensors.

    transformers   vit.encoder.layer.3.attention.attention.query, since version 5 vit.layers.3.attention.q_proj
    timm           blocks.3.attn.qkv

    y += (alpha / r) · x · Aᵀ · Bᵀ     A: lora_A [r, D], B: lora_B [D, r], of queries, keys and values each by itself

A bundle has one `down` for all three, so each adapter takes rows of it and is zero in the others' part of `up`.
Adapters of other layers, DoRA and biases do not map; the error names them. The head is that of `modules_to_save`.
Transformers' ViTs have an epsilon of 1e-12 in their norms, timm's 1e-6: answers differ in the sixth digit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .format import Format, Params, ReadParameters, Width, head
from .refusal import quoted, refusal

PREPROCESS = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
SITES: Final = (
    re.compile(r"(?:vit|deit)\.encoder\.layer\.(?P<layer>\d+)\.attention\.attention\.(?P<part>query|key|value)"),
    re.compile(r"(?:vit|deit)(?:\.encoder)?\.layers?\.(?P<layer>\d+)\.attention\.(?P<part>[qkv]_proj)"),
    re.compile(r"blocks\.(?P<layer>\d+)\.attn\.(?P<part>qkv)"),
)
PARTS: Final = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}
# settings that change the product, and the values that leave it unchanged
PLAIN: Final[Mapping[str, Any]] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "alpha_pattern": {},
    "use_qalora": False,
    "use_bdlora": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "target_parameters": None,
}
_LORA: Final = re.compile(r"(?P<site>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_HEADS: Final = ("classifier", "head")


def recognises(checkpoint: Checkpoint) -> bool:
    return any(_LORA.fullmatch(name) for name in checkpoint.arrays)


def read(checkpoint: Checkpoint, width: Width) -> ReadParameters:
    config = _config(checkpoint)
    layers: list[list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = [[] for _ in range(width.depth)]
    for layer, part, down, up in _pairs(checkpoint, width):
        scale = float(config["lora_alpha"]) / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
        layers[layer].append((down, _place(up.T * np.float32(scale), part, width.dim)))
    lengths = tuple(sum(len(down) for down, _ in pairs) for pairs in layers)
    rows = [pair for pairs in layers for pair in pairs]
    params: Params = {
        "lora.down": np.concatenate([down for down, _ in rows]),
        "lora.up": np.concatenate([up for _, up in rows]),
    }
    return ReadParameters("lora", lengths, {**params, **head(_with_saved_head(checkpoint), width, *_HEADS)}, PREPROCESS)


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    configs = [c for c in checkpoint.configs.values() if "peft_type" in c]
    if len(configs) != 1:
        raise refusal(f"expected one adapter_config.json beside the adapter's tensors, got {len(configs)}")
    config = configs[0]
    if config["peft_type"] != "LORA":
        raise refusal(f"adapter_config.json: expected peft_type LORA, got {quoted(config['peft_type'])}")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not 0 < abs(alpha) < 1e6:
        raise refusal(f"adapter_config.json: expected a number as lora_alpha, got {quoted(alpha)}")
    if config.get("bias", "none") != "none":
        raise refusal(
            f"adapter_config.json: bias: expected none, got {quoted(config['bias'])}: trained biases do not map"
        )
    for name, plain in PLAIN.items():
        if config.get(name) not in (plain, None, False):
            raise refusal(f"adapter_config.json: {name} does not map to a low-rank change of queries, keys and values")
    return config


def _pairs(checkpoint: Checkpoint, width: Width) -> Iterator[tuple[int, str, NDArray[np.float32], NDArray[np.float32]]]:
    """Layer, part, A [r, D] and B [O, r] of each adapted weight, in order."""
    sides = {name: match for name in checkpoint.arrays if (match := _LORA.fullmatch(name))}
    _refuse_others(checkpoint, set(sides))
    sites = sorted({match["site"] for match in sides.values()}, key=lambda site: (len(site), site))
    for site in sites:
        match = next((m for pattern in SITES if (m := pattern.fullmatch(site))), None)
        if match is None or int(match["layer"]) >= width.depth:
            raise refusal(
                f"LoRA on {quoted(site)} does not map: expected queries, keys and values of {width.depth} layers"
            )
        names = {sides[name]["side"]: name for name in sides if sides[name]["site"] == site}
        if set(names) != {"A", "B"}:
            raise refusal(f"{quoted(site)}: expected lora_A and lora_B, got {' and '.join(sorted(names))} only")
        down, up = checkpoint.floats(names["A"]), checkpoint.floats(names["B"])
        outer = width.dim * (3 if match["part"] == "qkv" else 1)
        if down.ndim != 2 or down.shape[1] != width.dim or up.shape != (outer, len(down)) or not len(down):
            got = f"{list(down.shape)} and {list(up.shape)}"
            raise refusal(f"{quoted(site)}: expected lora_A [r, {width.dim}] and lora_B [{outer}, r], got {got}")
        yield int(match["layer"]), match["part"], down, up


def _refuse_others(checkpoint: Checkpoint, known: set[str]) -> None:
    """Refuse other trained arrays, since the answers would lack them."""
    heads = tuple(f"{name}." for name in _HEADS)
    others = sorted(name for name in checkpoint.arrays if name not in known and not name.startswith(heads))
    if others:
        raise refusal(f"{quoted(others[0])} does not map: expected lora_A, lora_B and a classifier alone")


def _place(up: NDArray[np.float32], part: str, dim: int) -> NDArray[np.float32]:
    """B transposed [r, D], in the third of [r, 3·D] of its part; that of a joint qkv has the full width already."""
    if part == "qkv":
        return up
    placed = np.zeros((len(up), 3 * dim), np.float32)
    place = PARTS[part] * dim
    placed[:, place : place + dim] = up
    return placed


def _with_saved_head(checkpoint: Checkpoint) -> Checkpoint:
    """Rename the head that some versions save as `classifier.modules_to_save.default.weight`."""
    renamed = {re.sub(r"\.modules_to_save(\.default)?", "", name): array for name, array in checkpoint.arrays.items()}
    return Checkpoint(renamed, checkpoint.configs, checkpoint.sha256)


FORMAT = Format("peft", "a LoRA adapter of Hugging Face's PEFT for a ViT", recognises, read)
