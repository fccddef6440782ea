"""The literal forward of every method: slow, one task at a time, obviously right.

Prompts are inserted as tokens and the backbone's own blocks are called whole, exactly as the papers draw it; for a
method that changes weights, the blocks of a copy hold the changed weights. Every fast path is tested equal to this, and
this is tested equal to the official implementations' numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import GluMlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .backbone import Backbone
from .spec import Pool

Params = Mapping[str, Tensor]
_POOL: Final = "pool_of_the_task"  # attribute of a model's copy


def linear(backbone: Backbone, pixels: Tensor, params: Params) -> Tensor:
    """Linear probe: the plain ViT and a head. pixels [B, 3, S, S] → logits [B, C]."""
    return _leave(backbone.model, _blocks(backbone.model, _enter(backbone.model, pixels)), params)


def mlp(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """The plain ViT and a head with a hidden layer."""
    features = _features(backbone.model, _blocks(backbone.model, _enter(backbone.model, pixels)), 0)
    hidden = (features @ params["hidden.weight"].T + params["hidden.bias"]).relu()
    return hidden @ params["head.weight"].T + params["head.bias"]


def vpt_shallow(backbone: Backbone, pixels: Tensor, params: Params) -> Tensor:
    """VPT-shallow (Jia et al., ECCV 2022, eq. 4–6): prompts [p, D] enter once and are carried through all blocks."""
    x = _blocks(backbone.model, _insert(_enter(backbone.model, pixels), params["prompts"]))
    return _leave(backbone.model, x, params, prompts=len(params["prompts"]))


def vpt_deep(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """VPT-deep (eq. 7–8): each layer's prompts replace the previous layer's outputs for its prompts.

    prompts: [Σ p_l, D], rows in layer order; `prompt_lengths` gives p_l.
    """
    return _vpt_deep(backbone.model, pixels, params, prompt_lengths)


def bias(backbone: Backbone, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    """BitFit (Ben Zaken et al., ACL 2022): the task has its own value of every bias of the backbone."""
    model = _changed(backbone.model, moved_biases(backbone.model, params))
    return _leave(model, _blocks(model, _enter(model, pixels)), params)


def prompt_bias(backbone: Backbone, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    """VPT-deep in a backbone whose biases are the task's."""
    return _vpt_deep(_changed(backbone.model, moved_biases(backbone.model, params)), pixels, params, lengths)


def logits(
    method: str,
    backbone: Backbone,
    pixels: Tensor,
    params: Params,
    prompt_lengths: Sequence[int],
    *,
    pool: Pool | None = None,
) -> Tensor:
    """Pixels [B, 3, S, S] → logits [B, C] by any of our methods; `pool` is the head's pooling, None for timm's own."""
    read = copy.copy(backbone)
    read.model = copy.copy(backbone.model)  # the same modules
    vars(read.model)[_POOL] = pool
    return LITERAL[method](read, pixels, params, prompt_lengths)


def cvpt(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """CVPT (Huang et al., ICCV 2025): after each block's attention, the same frozen weights attend again: queries from
    the tokens, keys and values from the layer's prompts, without a norm before them."""
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
    """Adapters (Pfeiffer et al., EACL 2021): a bottleneck reads the MLP's output and is added to it."""
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
    """Keys and values as additional rows of each MLP, which is wider by their number. The rows of a gated MLP have no
    gate."""
    model = _with_memory(backbone.model, params, prompt_lengths, {})
    return _leave(model, _blocks(model, _enter(model, pixels)), params)


def readonly(backbone: Backbone, pixels: Tensor, params: Params, prompt_lengths: Sequence[int]) -> Tensor:
    """Ours: after the image's tokens come a copy of the class token and each layer's prompts, which a mask hides from
    them.

    Blocks with a task's queries and memory merged in run over all tokens; their outputs for the image's tokens are
    discarded: these continue through the plain blocks.
    """
    model, x, copied = backbone.model, _enter(backbone.model, pixels), None
    reading = max(1, sum(map(bool, prompt_lengths)))  # layers with prompts also have queries and memory
    ranks, rows = (
        [len(params[name]) // reading * bool(p) for p in prompt_lengths] for name in ("query.down", "memory.keys")
    )
    merged = _with_memory(model, params, rows, _queries(model, params, ranks))
    layers = zip(model.blocks, merged.blocks, params["prompts"].split(list(prompt_lengths)), strict=True)
    for block, merged_block, prompts in layers:
        if copied is None and len(prompts):
            copied = x[:, :1] if model.global_pool == "token" else x[:, model.num_prefix_tokens :].mean(1, keepdim=True)
        if copied is not None:
            tokens = torch.cat((x, copied, prompts.expand(len(x), -1, -1)), dim=1)
            copied = merged_block(tokens, attn_mask=_hidden_from_image(model, x, tokens))[:, x.shape[1], None]
        x = block(x)
    features = _features(model, x, 0) if copied is None else model.fc_norm(model.norm(copied[:, 0]))
    return features @ params["head.weight"].T + params["head.bias"]


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
    "readonly": readonly,
}


def _vpt_deep(model: VisionTransformer, pixels: Tensor, params: Params, lengths: Sequence[int]) -> Tensor:
    x, before = _enter(model, pixels), 0
    for block, prompts in zip(model.blocks, params["prompts"].split(list(lengths)), strict=True):
        x = block(_insert(_remove(x, before), prompts))
        before = len(prompts)
    return _leave(model, x, params, prompts=before)


def _hidden_from_image(model: VisionTransformer, x: Tensor, tokens: Tensor) -> Tensor:
    """[M, M], True where a row's token sees a column's: tokens of the image, x [B, N, D], see each other alone; the
    tokens behind them see all but the class token, which the copy replaces."""
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    seen[: x.shape[1], x.shape[1] :] = False
    if model.global_pool == "token":
        seen[x.shape[1] :, 0] = False
    return seen


def _queries(model: VisionTransformer, params: Params, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Low-rank changes merged into the queries' weights, by timm's names."""
    weights = {}
    layers = [params[name].split(list(lengths)) for name in ("query.down", "query.up")]
    for layer, (down, up) in enumerate(zip(*layers, strict=True)):
        name = f"blocks.{layer}.attn.qkv.weight"
        change = up.T @ down
        weights[name] = model.get_parameter(name) + torch.cat((change, change.new_zeros(2 * len(change), len(change))))
    return weights


def _with_memory(
    model: VisionTransformer, params: Params, lengths: Sequence[int], merged: Mapping[str, Tensor]
) -> VisionTransformer:
    """A copy with the parameters `merged`, whose MLPs have more rows. The rows of a gated MLP are computed beside it,
    because they have no gate."""
    layers = [params[name].split(list(lengths)) for name in ("memory.keys", "memory.values")]
    if not isinstance(model.blocks[0].mlp, GluMlp):
        return _changed(model, {**merged, **_wider(model, *layers)})
    changed = _changed(model, merged)
    for block, keys, values in zip(changed.blocks, *layers, strict=True):
        block.mlp.register_forward_hook(partial(_rows_beside, keys, values))
    return changed


def _rows_beside(keys: Tensor, values: Tensor, mlp: GluMlp, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + mlp.act(inputs[0] @ keys.T) @ values


def _wider(
    model: VisionTransformer, keys_of_layers: Sequence[Tensor], values_of_layers: Sequence[Tensor]
) -> dict[str, Tensor]:
    """MLPs with more rows, by timm's names."""
    tensors = {}
    for layer, (keys, values) in enumerate(zip(keys_of_layers, values_of_layers, strict=True)):
        mlp, name = model.blocks[layer].mlp, f"blocks.{layer}.mlp"
        tensors[f"{name}.fc1.weight"] = torch.cat((mlp.fc1.weight, keys))
        tensors[f"{name}.fc1.bias"] = torch.cat((mlp.fc1.bias, mlp.fc1.bias.new_zeros(len(keys))))
        tensors[f"{name}.fc2.weight"] = torch.cat((mlp.fc2.weight, values.T), dim=1)
    return tensors


def _cross_attention(attention: Attention, x: Tensor, prompts: Tensor) -> Tensor:
    """Queries from x [B, N, D], keys and values from prompts [p, D] → [B, N, D]."""
    width, heads = x.shape[-1], attention.num_heads
    weights = attention.qkv.weight.split(width)
    biases = (0.0, 0.0, 0.0) if attention.qkv.bias is None else attention.qkv.bias.split(width)
    query, keys, values = (
        (source @ weight.T + bias).unflatten(-1, (heads, -1)).transpose(-3, -2)  # [..., H, tokens, d]
        for source, weight, bias in zip((x, prompts, prompts), weights, biases, strict=True)
    )
    scores = attention.q_norm(query) @ attention.k_norm(keys).mT * attention.scale
    return attention.proj((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))


def moved_biases(model: VisionTransformer, params: Params) -> dict[str, Tensor]:
    """The backbone's biases with a task's shifts added, by timm's names."""
    shifts = {}
    for layer in range(len(model.blocks)):
        for site in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            shifts[f"blocks.{layer}.{site}.bias"] = params[f"bias.{site.split('.')[-1]}"][layer]
    entry = "norm_pre" if not isinstance(model.norm_pre, nn.Identity) else "patch_embed.proj"
    shifts |= {f"{entry}.bias": params["bias.entry"], f"{_before_head(model)}.bias": params["bias.norm"]}
    return {name: _bias_of(model, name) + shift for name, shift in shifts.items()}


def _before_head(model: VisionTransformer) -> str:
    """The last place before the head that has a bias, or could have one."""
    if model.global_pool == "map" and vars(model).get(_POOL) is None:
        return "attn_pool.mlp.fc2"
    return "norm" if not isinstance(model.norm, nn.Identity) else "fc_norm"


def _bias_of(model: nn.Module, name: str) -> Tensor | float:
    """The bias of that name; 0 if the backbone has none."""
    bias = model.get_parameter(name) if name in dict(model.named_parameters()) else None
    return 0.0 if bias is None else bias


def _changed(model: VisionTransformer, tensors: Mapping[str, Tensor]) -> VisionTransformer:
    """A copy with these parameters replaced; all others are shared with the original. Gradients reach the new ones."""
    changed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = changed.get_submodule(path)
        if hasattr(module, leaf):
            delattr(module, leaf)
            setattr(module, leaf, tensor)
        else:  # a norm without a bias, or an identity: add the bias to its output
            module.register_forward_hook(partial(_behind, tensor))
    return changed


def _behind(shift: Tensor, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output + (shift[:, None, None] if output.ndim == 4 else shift)  # pictures [B, D, H, W], tokens [B, N, D]


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
    return _features(model, x, prompts) @ params["head.weight"].T + params["head.bias"]


def _features(model: VisionTransformer, x: Tensor, prompts: int) -> Tensor:
    """Pooled features of x [B, N, D], which has `prompts` prompt tokens after the first token."""
    pool, x = vars(model).get(_POOL), model.norm(x)
    image = _remove(x, prompts)
    if pool is None:
        return model.forward_head(image, pre_logits=True)
    if pool == "cls":  # class and distillation token of a distilled DeiT
        return model.fc_norm(image[:, : 1 + hasattr(model, "dist_token")].mean(dim=1))
    patches = image[:, model.num_prefix_tokens :]
    if pool == "image_and_prompts":
        patches = torch.cat((x[:, 1 : 1 + prompts], patches), dim=1)
    return model.fc_norm(patches.mean(dim=1))
