"""The one frozen ViT: loaded, checked, fingerprinted, never changed.

The blocks stay timm's own modules, so the one forward in `vit.py` serves every ViT that `compatibility.incompatibility`
accepts: layer scale, qk-norm, pre-norm, register tokens, gated MLPs, with or without class token, with any pooling.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prompts_store import Preprocess

from . import bundled
from .block import FrozenBlock
from .bundled import BUNDLED
from .compatibility import GLOBAL_POOLS, incompatibility
from .float8 import unsupported_device, unsupported_widths
from .packed import can_pack
from .spec import Spec

UNTRAINED = "untrained"
FLOAT8 = "float8"  # value of the dtype setting: the blocks' products in 8 bits, all else in bfloat16
UNTRAINED_CONFIG: dict[str, Any] = {
    "img_size": 96,
    "patch_size": 12,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
}


class BackboneError(ValueError):
    """The backbone cannot be loaded or cannot be served; the message says why."""


class Backbone:
    """A frozen timm `VisionTransformer` on one device in one dtype.

    Shape: `model` maps pixels [B, 3, S, S] to tokens; prompts never enter it, see `vit.py`. `blocks` are its blocks as
    the forward uses them; `packed` says whether their weights are packed, `float8` whether they multiply in 8 bits;
    `dtype` is that of everything else.
    """

    def __init__(
        self,
        spec: Spec,
        model: VisionTransformer,
        device: torch.device,
        dtype: torch.dtype,
        packed: bool,
        *,
        float8: bool = False,
    ) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.packed, self.float8 = packed and not float8 and can_pack(device, dtype), float8
        self.blocks = [FrozenBlock(block, packed=self.packed, float8=float8) for block in self.model.blocks]

    def free_unpacked_weights(self) -> None:
        """Free the model's block weights where packed copies replace them. For a process that only serves: afterwards
        `model` can no longer be run, copied or exported."""
        if not self.packed:
            return
        for block in self.model.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                linear.weight.data = linear.weight.new_empty(0)

    @property
    def precision(self) -> str:
        """The precision of the blocks' products, as LENSRACK_DTYPE names it."""
        return FLOAT8 if self.float8 else str(self.dtype).removeprefix("torch.")

    @classmethod
    def of(
        cls,
        arch: str,
        model: VisionTransformer,
        *,
        trained: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        packed: bool = True,
        float8: bool = False,
    ) -> Backbone:
        """Wrap a timm model. `packed`: pack the blocks' weights if the machine can multiply them, see `packed.py`;
        `float8`: multiply in 8 bits, see `float8.py`.

        Raises BackboneError, with the reason, if the model's forward is not the plain one or cannot run in 8 bits.
        """
        reason = incompatibility(model)
        if reason is not None:
            raise BackboneError(f"backbone {arch!r} cannot be served: {reason}")
        spec = _spec(arch, model, trained)
        if (
            float8
            and (reason := unsupported_widths({spec.dim, spec.hidden, model.blocks[0].mlp.fc2.in_features})) is not None
        ):
            raise BackboneError(f"backbone {arch!r} cannot be served in float8: {reason}")
        return cls(spec, model, torch.device(device), dtype, packed, float8=float8)


def load(
    name: str,
    weights: Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    packed: bool = True,
) -> Backbone:
    """Load the backbone that a setting names.

    `name` is `bundled`, the backbone that ships with the project; or a timm architecture, with a tag for timm's own
    weights (downloaded once), without one together with `weights`, a safetensors file of timm keys; or `untrained`, a
    small seeded stand-in without training. Raises BackboneError.
    """
    target = _device(device)
    options: dict[str, Any] = {
        "device": target,
        "dtype": _dtype(dtype, target),
        "packed": packed,
        "float8": dtype == FLOAT8,
    }
    if name == UNTRAINED:
        if weights is not None:
            raise BackboneError("backbone 'untrained' takes no weights: name the timm architecture of the file")
        return Backbone.of(name, _stand_in(), trained=False, **options)
    if name == BUNDLED:
        return Backbone.of(*_bundled(weights), **options)
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        expected = f"expected {BUNDLED!r}, {UNTRAINED!r} or a timm architecture"
        raise BackboneError(f"LENSRACK_BACKBONE: unknown backbone {name!r}: {expected}{_nearest(name)}")
    model = _create(name, weights)
    return Backbone.of(name.split(".", maxsplit=1)[0], model, **options)


def _bundled(weights: Path | None) -> tuple[str, VisionTransformer]:
    if weights is not None:
        raise BackboneError("backbone 'bundled' brings its own weights: name the timm architecture of the file")
    try:
        arch, model = bundled.create()
    except ValueError as error:
        raise BackboneError(str(error)) from error
    load_weights(model, bundled.WEIGHTS)
    return arch, model


def _create(name: str, weights: Path | None) -> VisionTransformer:
    try:
        model = timm.create_model(name, pretrained=weights is None, num_classes=0)
    except Exception as error:  # the hub raises many kinds of errors; the operator needs only the message
        raise BackboneError(f"LENSRACK_BACKBONE: {_load_failure(name, error)}") from error
    if weights is not None:
        try:
            load_weights(model, weights)
        except BackboneError as error:
            raise BackboneError(f"LENSRACK_BACKBONE_WEIGHTS: {error}") from error
    return model


def _nearest(name: str, tags: bool = False) -> str:
    """The timm architectures, or with `tags` the pretrained weights, of the names nearest to a wrong one."""
    known = timm.list_pretrained(f"{name.split('.', maxsplit=1)[0]}.*") if tags else timm.list_models()
    wanted = name if tags else name.split(".", maxsplit=1)[0]
    nearest = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(nearest)}" if nearest else ""


def _load_failure(name: str, error: Exception) -> str:
    """Why timm did not make the model of a known architecture, in a sentence."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "pretrained tag" in reason:
        return f"backbone {name!r} has no weights of this tag{_nearest(name, tags=True)}"
    if isinstance(error, OSError | TimeoutError) or "connect" in reason.lower() or "offline" in reason.lower():
        instead = "expected a network connection, or a file of the weights in LENSRACK_BACKBONE_WEIGHTS"
        return f"the weights of backbone {name!r} could not be downloaded: {instead} ({type(error).__name__}: {reason})"
    return f"backbone {name!r} could not be loaded: {reason}"


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file of timm keys strictly, except that a classifier `head.*` in it is ignored."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"backbone weights {file} cannot be read as safetensors: {error}") from error
    expected = model.state_dict()
    tensors = {key: tensor for key, tensor in tensors.items() if key in expected or not key.startswith("head")}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise BackboneError(
            f"backbone weights {file} do not fit: expected {len(expected)} tensors, found {len(tensors)}; "
            f"missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise BackboneError(
                f"backbone weights {file} do not fit: "
                f"{key} is {list(tensor.shape)}, expected {list(expected[key].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise BackboneError(f"backbone weights {file}: {key} holds NaN or infinity")
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=True)


def fingerprint(arch: str, state: Mapping[str, Tensor]) -> str:
    """sha256 over the architecture's name and every tensor: name, shape, little-endian float32 contents."""
    digest = hashlib.sha256(arch.encode() + b"\0")
    for key in sorted(state):
        array = state[key].detach().cpu().float().contiguous().numpy()
        digest.update(f"{key}{list(array.shape)}\0".encode())
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()


def _spec(arch: str, model: VisionTransformer, trained: bool) -> Spec:
    return Spec(
        arch=arch,
        fingerprint=fingerprint(arch, model.state_dict()),
        trained=trained,
        depth=len(model.blocks),
        dim=model.embed_dim,
        heads=model.blocks[0].attn.num_heads,
        hidden=model.blocks[0].mlp.fc1.out_features,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.feat_ratio(as_scalar=False)[0],
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        prefix_tokens=model.num_prefix_tokens,
        class_tokens=_class_tokens(model),
        pool=GLOBAL_POOLS[model.global_pool],
        preprocess=_preprocess(model, model.patch_embed.img_size[0]),
    )


def _class_tokens(model: VisionTransformer) -> int:
    return 2 if isinstance(model, VisionTransformerDistilled) else int(model.cls_token is not None)


def _preprocess(model: VisionTransformer, size: int) -> Preprocess:
    """The preprocessing of this backbone's pretraining: the default of new bundles, which carry their own copy."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean", (0.5, 0.5, 0.5)), config.get("std", (0.5, 0.5, 0.5))
    return Preprocess(
        size=size,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        interpolation=config.get("interpolation") or "bicubic",
        crop_pct=float(config.get("crop_pct") or 1.0),
        crop_mode=config.get("crop_mode") or "center",
    )


def _stand_in() -> VisionTransformer:
    """A small ViT with weights from a seed: every machine draws the same ones, so the fingerprint is the same."""
    model = VisionTransformer(**UNTRAINED_CONFIG, num_classes=0)
    bits = np.random.PCG64(20_261)  # raw PCG64 outputs are the stream that NumPy keeps stable across versions
    state = {}
    for key, tensor in sorted(model.state_dict().items()):
        if tensor.ndim == 1:  # norms and biases: neutral values
            state[key] = (
                torch.ones_like(tensor) if "norm" in key and key.endswith("weight") else torch.zeros_like(tensor)
            )
            continue
        uniform = (bits.random_raw(tensor.numel()) >> np.uint64(11)).astype(np.float64) * 2.0**-53 * 2 - 1
        fan_in = tensor.shape[-1] if tensor.ndim != 4 else math.prod(tensor.shape[1:])
        bound = math.sqrt(3 / fan_in) if key.endswith("weight") else 0.2
        state[key] = torch.from_numpy((uniform * bound).astype(np.float32)).reshape(tensor.shape)
    model.load_state_dict(state)
    return model


def _device(name: str) -> torch.device:
    """Raises BackboneError for a device that torch does not know, or that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError and others, by device and build
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"LENSRACK_DEVICE: expected auto, cpu, cuda or cuda:N, got {name!r}: {reason}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == FLOAT8:
        if (reason := unsupported_device(device)) is not None:
            raise BackboneError(f"LENSRACK_DTYPE: float8: {reason}")
        return torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in known:
        raise BackboneError(
            f"LENSRACK_DTYPE: unknown dtype {name!r}: expected auto or one of {sorted([*known, FLOAT8])}"
        )
    return known[name]
