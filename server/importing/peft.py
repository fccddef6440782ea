"""LoRA adapters as Hugging Face's PEFT saves them for ViTs: adapter_config.json and adapter_model.safetensors.

    transformers   encoder.layer.3.attention.attention.query, since version 5 layers.3.attention.q_proj
    timm           blocks.3.attn.qkv

    y += (alpha / r) · x · Aᵀ · Bᵀ     A: lora_A [r, D], B: lora_B [D, r], of queries, keys and values each by itself

With `use_rslora` the factor is alpha / √r. `rank_pattern` and `alpha_pattern` give modules their own r and alpha: of
the patterns, regular expressions for a module's whole name or its end, the first that matches counts.

A bundle has one `down` for all three, so each adapter takes rows of it and is zero in the others' part of `up`.
Adapters of other layers, DoRA, biases, and initialisations that change the backbone do not map; the error names them.
The head is that of `modules_to_save`.
Transformers' ViTs have an epsilon of 1e-12 in their norms, timm's 1e-6: answers differ in the sixth digit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .format import HALVES, HEADS, BackboneShape, Format, Params, ReadParameters, head
from .refusal import quoted, refusal

SITES: Final = (
    re.compile(r"encoder\.layer\.(?P<layer>\d{1,4})\.attention\.attention\.(?P<part>query|key|value)"),
    re.compile(r"(?:encoder\.)?layers?\.(?P<layer>\d{1,4})\.attention\.(?P<part>[qkv]_proj)"),
    re.compile(r"blocks\.(?P<layer>\d{1,4})\.attn\.(?P<part>qkv)"),
)
PARTS: Final = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}
# settings that change the product, and the values that leave it unchanged
PLAIN: Final[Mapping[str, Any]] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "target_parameters": None,
}
_HARMLESS: Final = frozenset({"use_rslora"})  # of the settings `use_…`
_CHANGING: Final = ("pissa", "corda", "olora", "loftq", "lora_ga")  # initialisations that change the backbone's weights
_LORA: Final = re.compile(r"(?P<site>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_SAVED: Final = r"(?:(?:modules_to_save(?:\.default)?|original_module)\.)?"
_HEAD: Final = re.compile(rf"(?:{'|'.join(HEADS)})\.{_SAVED}(?:weight|bias)")
_DEFAULT_RANK: Final = 8  # PEFT's


def recognises(checkpoint: Checkpoint) -> bool:
    return any(_LORA.fullmatch(name) for name in checkpoint.arrays)


def read(checkpoint: Checkpoint, shape: BackboneShape) -> ReadParameters:
    config = _config(checkpoint)
    layers: list[list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = [[] for _ in range(shape.depth)]
    for module, layer, part, down, up in _pairs(checkpoint, shape):
        scale = _scale(config, module, len(down))
        layers[layer].append((down, _place(up.T * np.float32(scale), part, shape.dim)))
    lengths = tuple(sum(len(down) for down, _ in pairs) for pairs in layers)
    rows = [pair for pairs in layers for pair in pairs]
    params: Params = {
        "lora.down": np.concatenate([down for down, _ in rows]),
        "lora.up": np.concatenate([up for _, up in rows]),
    }
    return ReadParameters("lora", lengths, {**params, **head(_with_saved_head(checkpoint), shape)}, HALVES)


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    configs = [c for c in checkpoint.configs.values() if "peft_type" in c]
    if len(configs) != 1:
        raise refusal(f"expected one adapter_config.json beside the adapter's tensors, got {len(configs)}")
    config = configs[0]
    if config["peft_type"] != "LORA":
        raise refusal(f"adapter_config.json: expected peft_type LORA, got {quoted(config['peft_type'])}")
    _number("lora_alpha", config.get("lora_alpha"))
    if config.get("bias", "none") != "none":
        raise refusal(
            f"adapter_config.json: bias: expected none, got {quoted(config['bias'])}: trained biases do not map"
        )
    uses = {name: False for name in config if name.startswith("use_") and name not in _HARMLESS}
    for name, plain in {**uses, **PLAIN}.items():
        if config.get(name) not in (plain, None, False):
            raise refusal(f"adapter_config.json: {name} does not map to a low-rank change of queries, keys and values")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGING):
        raise refusal(
            f"adapter_config.json: init_lora_weights {quoted(initial)} does not map: it changes the backbone. Expected "
            "an adapter that PEFT saved with path_initial_model_for_weight_conversion"
        )
    return config


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < abs(value) < 1e6:
        raise refusal(f"adapter_config.json: expected a number as {name}, got {quoted(value)}")
    return float(value)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of the adapter of this `rank` on a module. Raises Unprocessable for another rank than configured."""
    configured = _of_module(config, "rank_pattern", module, config.get("r", _DEFAULT_RANK))
    if configured != rank:
        raise refusal(f"{quoted(module)}: expected rank {configured:g} as adapter_config.json has it, got {rank}")
    alpha = _of_module(config, "alpha_pattern", module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], name: str, module: str, default: object) -> float:
    """The value of the first pattern that matches the module, as PEFT's `get_pattern_key` matches it."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise refusal(f"adapter_config.json: expected an object as {name}, got {quoted(patterns)}")
    for pattern, value in patterns.items():
        if _matches(name, pattern, module):
            return _number(f"{name} {quoted(pattern)}", value)
    return _number("r" if name == "rank_pattern" else "lora_alpha", default)


def _matches(name: str, pattern: str, module: str) -> bool:
    """Whether the pattern matches, by Arrow's RE2: its time is linear, whatever the pattern, which may be hostile."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return bool(pc.match_substring_regex(pa.array([module]), rf"^(.*\.)?({pattern})$")[0].as_py())
    except pa.ArrowInvalid:
        raise refusal(
            f"adapter_config.json: {name} {quoted(pattern)}: expected a module's name or a regular expression without "
            "look-arounds and back-references"
        ) from None


Pair = tuple[str, int, str, NDArray[np.float32], NDArray[np.float32]]


def _pairs(checkpoint: Checkpoint, shape: BackboneShape) -> Iterator[Pair]:
    """Module, layer, part, A [r, D] and B [O, r] of each adapted weight, in order."""
    sides = {name: match for name in checkpoint.arrays if (match := _LORA.fullmatch(name))}
    _refuse_others(checkpoint, set(sides))
    sites = sorted({match["site"] for match in sides.values()}, key=lambda site: (len(site), site))
    for site in sites:
        match = next((m for pattern in SITES if (m := pattern.fullmatch(site))), None)
        if match is None or int(match["layer"]) >= shape.depth:
            raise refusal(
                f"LoRA on {quoted(site)} does not map: expected queries, keys and values of {shape.depth} layers"
            )
        names = {sides[name]["side"]: name for name in sides if sides[name]["site"] == site}
        if set(names) != {"A", "B"}:
            raise refusal(f"{quoted(site)}: expected lora_A and lora_B, got {' and '.join(sorted(names))} only")
        down, up = checkpoint.floats(names["A"]), checkpoint.floats(names["B"])
        outer = shape.dim * (3 if match["part"] == "qkv" else 1)
        if down.ndim != 2 or down.shape[1] != shape.dim or up.shape != (outer, len(down)) or not len(down):
            got = f"{list(down.shape)} and {list(up.shape)}"
            raise refusal(f"{quoted(site)}: expected lora_A [r, {shape.dim}] and lora_B [{outer}, r], got {got}")
        yield _module(checkpoint.sources[names["A"]]), int(match["layer"]), match["part"], down, up


def _module(source: str) -> str:
    """The name by which PEFT knows an adapted module, of its lora_A's name in the file."""
    return re.sub(r"\.lora_A(\.default)?\.weight$", "", re.sub(r"^.*?base_model\.model\.", "", source))


def _refuse_others(checkpoint: Checkpoint, known: set[str]) -> None:
    """Refuse other trained arrays, since the answers would lack them."""
    others = sorted(name for name in checkpoint.arrays if name not in known and not _HEAD.fullmatch(name))
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
    return replace(checkpoint, arrays=renamed)


FORMAT = Format("peft", "a LoRA adapter of Hugging Face's PEFT for a ViT", recognises, read)
