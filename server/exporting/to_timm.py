"""A task for users of timm without lensrack: the backbone's state dict and the task's parameters in one safetensors
file.

    linear, bias, lora              the parameters are merged into timm's own weights: a plain timm model with a
                                    classifier
    vpt_deep, vpt_shallow,          the same, and `prompts.<layer>` [p, D] for each layer that has any, which go behind
    prompt_bias                     the class token; docs/howto-import.md has the ten lines that do it

The other methods have parts that have no place in a timm model: they are refused, ONNX takes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor

from prompts_store import Bundle
from server.engine import reference
from server.engine.backbone import Backbone
from server.errors import Unprocessable

Params = Mapping[str, Tensor]
Lengths = tuple[int, ...]


def to_timm(bundle: Bundle, backbone: Backbone) -> bytes:
    """A safetensors file; its metadata has architecture, labels and preprocessing.

    Raises Unprocessable (not_exportable) for methods that have no place in a timm model.
    """
    manifest = bundle.manifest
    if manifest.method not in LEARNED:
        raise Unprocessable(
            f"method {manifest.method} does not fit into a timm model: expected one of {', '.join(LEARNED)}; "
            "the format onnx takes all",
            code="not_exportable",
        )
    if manifest.pool is not None:
        raise Unprocessable(
            f"the task's head reads pool {manifest.pool!r}, a timm model of this architecture does not: "
            "the format onnx takes it",
            code="not_exportable",
        )
    params = {name: torch.tensor(array).to(backbone.dtype) for name, array in bundle.tensors.items()}
    frozen = backbone.model.state_dict()
    learned = LEARNED[manifest.method](backbone, params, manifest.prompt_lengths)
    head = {name: params[name] for name in ("head.weight", "head.bias")}
    state = {**frozen, **learned, **head}
    return save({name: tensor.float().contiguous() for name, tensor in state.items()}, _metadata(bundle))


def _metadata(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    described = {"labels": manifest.labels, "preprocess": asdict(manifest.preprocess)}
    return {
        "architecture": manifest.backbone.arch,
        "backbone": manifest.backbone.fingerprint,
        "task": manifest.task,
        "version": bundle.version,
        "method": manifest.method,
        **{name: json.dumps(value) for name, value in described.items()},
    }


def _prompts(backbone: Backbone, params: Params, lengths: Lengths) -> dict[str, Tensor]:
    layers = params["prompts"].split(list(lengths))
    return {f"prompts.{layer}": prompts for layer, prompts in enumerate(layers) if len(prompts)}


def _bias(backbone: Backbone, params: Params, lengths: Lengths) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = reference.moved_biases(backbone.model, params)
    if strangers := sorted(set(moved) - set(backbone.model.state_dict())):
        raise Unprocessable(f"the backbone has no {strangers[0]}, which the task changes", code="not_exportable")
    return moved


def _lora(backbone: Backbone, params: Params, lengths: Lengths) -> dict[str, Tensor]:
    """Hu et al., ICLR 2022, section 4.1: merged into the weights, it costs nothing."""
    layers = zip(*(params[name].split(list(lengths)) for name in ("lora.down", "lora.up")), strict=True)
    names = [f"blocks.{layer}.attn.qkv.weight" for layer in range(len(lengths))]
    return {
        name: backbone.model.get_parameter(name) + up.T @ down for name, (down, up) in zip(names, layers, strict=True)
    }


Learned = Callable[[Backbone, Params, Lengths], dict[str, Tensor]]
LEARNED: Final[Mapping[str, Learned]] = {
    "linear": lambda *_: {},
    "bias": _bias,
    "lora": _lora,
    "vpt_deep": _prompts,
    "vpt_shallow": _prompts,
    "prompt_bias": lambda *args: {**_bias(*args), **_prompts(*args)},
}
