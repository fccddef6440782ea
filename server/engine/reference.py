"""The literal forward of every method: slow, one task at a time, obviously right.

Prompts are inserted as tokens and the backbone's own blocks are called whole, exactly as the papers draw it; where a
method changes weights, the blocks of a copy hold the changed ones. Every fast path is tested equal to this, and this is
tested equal to the official implementations' numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .backbone import Backbone

Params = Mapping[str, Tensor]


def linear(backbone: Backbone, pixels: Tensor, params: Params) -> Tensor:
    """Linear probe: the plain ViT and a head. pixels [B, 3, S, S] → logits [B, C]."""
    return _leave(backbone.model, _blocks(backbone.model, _enter(backbone.model, pixels)), params)


def mlp(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """The plain ViT and a head with a hidden layer."""
    features = _features(backbone.model, _blocks(backbone.model, _enter(backbone.model, pixels)))
    hidden = (features @ params["hidden.weight"].T + params["hidden.bias"]).relu()
    return hidden @ params["head.weight"].T + params["head.bias"]


def vpt_shallow(backbone: Backbone, pixels: Tensor, params: Params) -> Tensor:
    """VPT-shallow (Jia et al., ECCV 2022, eq. 4–6): prompts [p, D] enter once and are carried through all blocks."""
    x = _blocks(backbone.model, _insert(_enter(backbone.model, pixels), params["prompts"]))
    return _leave(backbone.model, x, params, prompts=len(params["prompts"]))


def vpt_deep(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """VPT-deep (eq. 7–8): each layer's prompts replace what the layer before made of its own.

    prompts: [Σ p_l, D], rows in layer order; `prompt_lengths` gives p_l.
    """
    return _vpt_deep(backbone.model, pixels, params, prompt_lengths)


def bias(backbone: Backbone, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    """BitFit (Ben Zaken et al., ACL 2022): every bias of the backbone is the task's own."""
    model = _changed(backbone.model, _biases(backbone.model, params))
    return _leave(model, _blocks(model, _enter(model, pixels)), params)


def prompt_bias(backbone: Backbone, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    """VPT-deep in a backbone whose biases are the task's own."""
    return _vpt_deep(_changed(backbone.model, _biases(backbone.model, params)), pixels, params, lengths)


def logits(method: str, backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """Pixels [B, 3, S, S] → logits [B, C] by any method of ours."""
    return LITERAL[method](backbone, pixels, params, prompt_lengths)


def cvpt(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """CVPT (Huang et al., ICCV 2025): behind each block's attention, its own frozen weights once more, queries from the
    tokens, keys and values from the layer's prompts, and no norm before any of them."""
    x = _enter(backbone.model, pixels)
    for block, prompts in zip(backbone.model.blocks, params["prompts"].split(list(prompt_lengths)), strict=True):
        x = x + block.ls1(block.attn(block.norm1(x)))
        if len(prompts):
            x = x + block.ls1(_cross_attention(block.attn, x, prompts))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return _leave(backbone.model, x, params)


def lora(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """LoRA (Hu et al., ICLR 2022, section 4.1), merged into the weights: W + (down · up)ᵀ."""
    layers = [params[name].split(list(prompt_lengths)) for name in ("lora.down", "lora.up")]
    merged = {}
    for layer, (down, up) in enumerate(zip(*layers, strict=True)):
        name = f"blocks.{layer}.attn.qkv.weight"
        merged[name] = backbone.model.get_parameter(name) + up.T @ down
    model = _changed(backbone.model, merged)
    return _leave(model, _blocks(model, _enter(model, pixels)), params)


def adapter(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """Adapters (Pfeiffer et al., EACL 2021): a bottleneck reads what the MLP gives and is added to it."""
    names = ("down.weight", "down.bias", "up.weight")
    layers = [params[f"adapter.{name}"].split(list(prompt_lengths)) for name in names]
    x, biases = _enter(backbone.model, pixels), iter(params["adapter.up.bias"])
    for block, down, down_bias, up in zip(backbone.model.blocks, *layers, strict=True):
        x = x + block.ls1(block.attn(block.norm1(x)))
        out = block.mlp(block.norm2(x))
        if len(down):
            out = out + F.linear(F.gelu(F.linear(out, down, down_bias)), up.T, next(biases))
        x = x + block.ls2(out)
    return _leave(backbone.model, x, params)


def memory(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """Keys and values as rows of each MLP, which is wider by that much."""
    layers = [params[name].split(list(prompt_lengths)) for name in ("memory.keys", "memory.values")]
    wider = {}
    for layer, (keys, values) in enumerate(zip(*layers, strict=True)):
        mlp, name = backbone.model.blocks[layer].mlp, f"blocks.{layer}.mlp"
        wider[f"{name}.fc1.weight"] = torch.cat((mlp.fc1.weight, keys))
        wider[f"{name}.fc1.bias"] = torch.cat((mlp.fc1.bias, mlp.fc1.bias.new_zeros(len(keys))))
        wider[f"{name}.fc2.weight"] = torch.cat((mlp.fc2.weight, values.T), dim=1)
    model = _changed(backbone.model, wider)
    return _leave(model, _blocks(model, _enter(model, pixels)), params)


Literal = Callable[[Backbone, Tensor, Params, Sequence[int]], Tensor]
LITERAL: Final[Mapping[str, Literal]] = {
    "vpt_deep": vpt_deep,
    "vpt_shallow": lambda backbone, pixels, params, _: vpt_shallow(backbone, pixels, params),
    "linear": lambda backbone, pixels, params, _: linear(backbone, pixels, params),
    "mlp": mlp,
    "bias": bias,
    "prompt_bias": prompt_bias,
    "cvpt": cvpt,
    "lora": lora,
    "adapter": adapter,
    "memory": memory,
}


def _vpt_deep(model: VisionTransformer, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    x, before = _enter(model, pixels), 0
    for block, prompts in zip(model.blocks, params["prompts"].split(list(lengths)), strict=True):
        x = block(_insert(_remove(x, before), prompts))
        before = len(prompts)
    return _leave(model, x, params, prompts=before)


def _cross_attention(attention: Attention, x: Tensor, prompts: Tensor) -> Tensor:
    """Queries from x [B, N, D], keys and values from prompts [p, D] → [B, N, D]."""
    width, heads = x.shape[-1], attention.num_heads
    weights = attention.qkv.weight.split(width)
    biases = (0.0, 0.0, 0.0) if attention.qkv.bias is None else attention.qkv.bias.split(width)
    query, keys, values = (
        (source @ weight.T + own).unflatten(-1, (heads, -1)).transpose(-3, -2)  # [..., H, tokens, d]
        for source, weight, own in zip((x, prompts, prompts), weights, biases, strict=True)
    )
    scores = attention.q_norm(query) @ attention.k_norm(keys).mT * attention.scale
    return attention.proj((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))


def _biases(model: VisionTransformer, params: Params) -> dict[str, Tensor]:
    """The backbone's biases with a task's shifts added, by timm's names."""
    found = {}
    for layer in range(len(model.blocks)):
        for site in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            found[f"blocks.{layer}.{site}.bias"] = params[f"bias.{site.split('.')[-1]}"][layer]
    entry = "norm_pre" if isinstance(model.norm_pre, nn.LayerNorm) else "patch_embed.proj"
    leave = "norm" if isinstance(model.norm, nn.LayerNorm) else "fc_norm"
    found |= {f"{entry}.bias": params["bias.entry"], f"{leave}.bias": params["bias.norm"]}
    return {name: _bias_of(model, name) + shift for name, shift in found.items()}


def _bias_of(model: nn.Module, name: str) -> Tensor | float:
    """A backbone without this bias has it at zero."""
    own = model.get_parameter(name) if name in dict(model.named_parameters()) else None
    return 0.0 if own is None else own


def _changed(model: VisionTransformer, tensors: Mapping[str, Tensor]) -> VisionTransformer:
    """A copy with these parameters in the place of its own, which it shares otherwise. Gradients reach them."""
    found = copy.deepcopy(model, {id(own): own for own in model.parameters()})
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = found.get_submodule(path)
        delattr(module, leaf)
        setattr(module, leaf, tensor)
    return found


def _enter(model: VisionTransformer, pixels: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(pixels)))


def _blocks(model: VisionTransformer, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def _insert(x: Tensor, prompts: Tensor) -> Tensor:
    """[CLS | prompts | patches], the layout of the paper."""
    return torch.cat((x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]), dim=1)


def _remove(x: Tensor, prompts: int) -> Tensor:
    return torch.cat((x[:, :1], x[:, 1 + prompts :]), dim=1)


def _leave(model: VisionTransformer, x: Tensor, params: Params, prompts: int = 0) -> Tensor:
    return _features(model, _remove(x, prompts)) @ params["head.weight"].T + params["head.bias"]


def _features(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.forward_head(model.norm(x), pre_logits=True)
