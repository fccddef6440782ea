"""Golden cases: weights, bundles and images drawn from seeds, numbers from the official implementations.

`tests/golden/numbers/index.json` names each case's origin (repository, commit, files); `recipe.py` draws its inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from server.engine import reference
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.images.decode import Geometry
from server.engine.lens import Dense, Lens, no_prefix
from server.engine.rack import Rack
from server.engine.residency import Seat
from server.methods.registry import Registry

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
INDEX = json.loads((GOLDEN / "numbers" / "index.json").read_text())
METHODS = {"spt_deep": "vpt_deep", "spt_shallow": "vpt_shallow", "vpt_deep_project": "vpt_deep"}
NANO = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4}

_spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def cases(kind: str) -> list[Any]:
    return [case for case in INDEX["cases"] if case["kind"] == kind]


def name_of(case: Mapping[str, Any]) -> str:
    return str(case["name"])


def numbers(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "numbers" / case["file"])


def tolerance(case: Mapping[str, Any], dtype: torch.dtype) -> float:
    name = str(dtype).removeprefix("torch.")
    return float({**INDEX["tolerance"], **case.get("tolerance", {})}[name])


@functools.lru_cache(maxsize=2)
def _weights(arch: str, seed: int) -> dict[str, np.ndarray]:
    return dict(recipe.backbone(arch, seed))


@functools.lru_cache(maxsize=2)
def golden_backbone(arch: str, seed: int, dtype: torch.dtype) -> Backbone:
    model = VisionTransformer(**NANO, num_classes=0) if arch == "vit_nano" else timm.create_model(arch, num_classes=0)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in _weights(arch, seed).items()}, strict=True)
    return Backbone.of(arch, model, dtype=dtype)


@dataclass(frozen=True)
class Task:
    """One task of a golden case: its method in our words and its parameters in our layout."""

    method: str
    params: dict[str, Tensor]
    lengths: tuple[int, ...]

    def literal(self, backbone: Backbone, images: Tensor) -> Tensor:
        return reference.logits(self.method, backbone, images, self.params, self.lengths)

    def lens(self, backbone: Backbone) -> Lens:
        return Registry().get(self.method).lower(backbone, self.params, self.lengths)


class Mlp3(Task):
    """VPT's MLP-3: two hidden layers, a ReLU and a batch norm behind each. No method of ours, but a head like ours."""

    def literal(self, backbone: Backbone, images: Tensor) -> Tensor:
        plain = {
            "head.weight": torch.eye(backbone.spec.dim, dtype=backbone.dtype),
            "head.bias": torch.zeros(1, dtype=backbone.dtype),
        }
        x = reference.linear(backbone, images, plain)
        for name in ("mlp.0", "mlp.1"):
            x = F.linear(x, self.params[f"{name}.fc.weight"], self.params[f"{name}.fc.bias"]).relu()
            statistics = (
                self.params[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, *statistics, eps=1e-5)
        return F.linear(x, self.params["head.weight"], self.params["head.bias"])

    def lens(self, backbone: Backbone) -> Lens:
        """Each batch norm becomes a part of the layer that follows."""
        nothing = no_prefix(backbone.spec.depth, self.params["head.weight"])
        second = self._behind("mlp.0", "mlp.1.fc")
        head = self._behind("mlp.1", "head")
        hidden = (Dense(self.params["mlp.0.fc.weight"], self.params["mlp.0.fc.bias"]), second)
        return Lens(nothing, nothing, nothing[0], head.weight, head.bias, hidden=hidden)

    def _behind(self, norm: str, layer: str) -> Dense:
        mean, variance, weight, bias = (
            self.params[f"{norm}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        scale = weight / (variance + 1e-5).sqrt()
        row_weights = self.params[f"{layer}.weight"]
        return Dense(row_weights * scale, self.params[f"{layer}.bias"] + row_weights @ (bias - mean * scale))


def drawing(case: Mapping[str, Any]) -> dict[str, int]:
    """The options that the recipe draws a bundle with."""
    return {name: value for name, value in case.get("options", {}).items() if name in ("project", "reduction")}


def task(case: Mapping[str, Any], arch: str, dtype: torch.dtype) -> Task:
    raw = recipe.bundle(
        case["method"],
        arch,
        case["p"],
        case["classes"],
        case["bundle_seed"],
        **drawing(case),
    )
    params = {key: torch.from_numpy(array).to(dtype) for key, array in raw.items()}
    scale = case.get("options", {})
    for key in ("head.weight", "head.bias"):
        params[key] = params[key] * scale.get("scale_head", 1)
    method = METHODS.get(case["method"], case["method"])
    depth = recipe.ARCHS[arch]["depth"]
    if method == "mlp3":
        return Mlp3(method, params, (0,) * depth)
    if method in REPLACED:
        width = recipe.ARCHS[arch]["embed"] // case["options"]["reduction"] if method == "adapter" else 0
        return Task(method, REPLACED[method](params, arch, dtype), (width,) * depth)
    prompts = params["prompts"] * scale.get("scale_prompts", 1)
    if "prompt_proj.weight" in params:  # folded once, as an importer would
        prompts = prompts @ params.pop("prompt_proj.weight").T + params.pop("prompt_proj.bias")
    p = case["p"]
    lengths = tuple(p) if isinstance(p, list) else (p, *(0 if method == "vpt_shallow" else p for _ in range(depth - 1)))
    params["prompts"] = prompts.reshape(-1, prompts.shape[-1])
    return Task(method, params, lengths)


def _as_bias(params: dict[str, Tensor], arch: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The official bundle replaces biases; ours says how far each moves."""
    backbone = golden_backbone(arch, 101, dtype).model
    moved = {name: value if "head" in name else value - backbone.get_parameter(name) for name, value in params.items()}
    biases = {name: value for name, value in moved.items() if "head" in name}
    for site in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        layers = [moved[f"blocks.{layer}.{site}.bias"] for layer in range(len(backbone.blocks))]
        biases[f"bias.{site.split('.')[-1]}"] = torch.stack(layers)
    return {**biases, "bias.entry": moved["patch_embed.proj.bias"], "bias.norm": moved["norm.bias"]}


def _as_adapter(params: dict[str, Tensor], arch: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Layer by layer to all layers' rows in order; an official `up` has a column where ours has a row."""
    layers = range(recipe.ARCHS[arch]["depth"])
    adapters = {name: value for name, value in params.items() if "head" in name}
    for name in ("down.weight", "down.bias"):
        adapters[f"adapter.{name}"] = torch.cat([params[f"adapter.{layer}.{name}"] for layer in layers])
    adapters["adapter.up.weight"] = torch.cat([params[f"adapter.{layer}.up.weight"].T for layer in layers])
    adapters["adapter.up.bias"] = torch.stack([params[f"adapter.{layer}.up.bias"] for layer in layers])
    return adapters


REPLACED: dict[str, Callable[[dict[str, Tensor], str, torch.dtype], dict[str, Tensor]]] = {
    "linear": lambda params, *_: params,
    "bias": _as_bias,
    "adapter": _as_adapter,
}


def pixels(case: Mapping[str, Any], arch: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(recipe.images(case["n"], recipe.ARCHS[arch]["size"], case["image_seed"])).to(dtype)


class Bench:
    """An engine with a rack of its own, to seat lenses by hand."""

    def __init__(self, backbone: Backbone, *, slots: int = 64, vectors: int = 20_000) -> None:
        self.backbone = backbone
        self.rack = Rack(
            dim=backbone.spec.dim, slots=slots, vectors=vectors, device=backbone.device, dtype=backbone.dtype
        )
        self.engine = Engine(backbone, self.rack)
        self._names = itertools.count()

    def seat(self, lens: Lens, mean: float = 0.5, std: float = 0.5) -> Seat:
        place = self.rack.allocate(lens)
        self.rack.write(place, lens)
        labels = tuple(str(n) for n in range(lens.classes))
        geometry = Geometry(self.backbone.spec.image_size, "bicubic", 1.0, "center")
        return Seat(f"task-{next(self._names)}", "0" * 64, place, labels, geometry, (mean,) * 3, (std,) * 3)
