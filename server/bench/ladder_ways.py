"""Ways to compute a frozen block that the engine does not take, measured by `bench ladder` beside its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from server.engine.block import FrozenBlock
from server.engine.packed import PackedLinear

from .ladder_bench import NotHere


class Separate(FrozenBlock):
    """Sums and GELU as operations of their own."""

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        found: Tensor = x + self.ls1(self.project(mixed))
        return found

    def after_mlp(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.ls2(self.behind_hidden(self.hidden(self.norm2(x))))
        return found


class OneProduct(FrozenBlock):
    def __init__(self, block: Block, *, packed: bool) -> None:
        super().__init__(block, packed=packed)
        self._qkv = PackedLinear(block.attn.qkv.weight, block.attn.qkv.bias)


class Int8Linear:
    """Weights in 8 bits, a scale for each output; x in 8 bits, a scale for each row, found in every call."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._scale = weight.abs().amax(1).clamp_min(1e-8) / 127
        self._rounded = (weight / self._scale[:, None]).round().to(torch.int8).t()
        self._bias, self._plain = bias, weight
        try:
            self(torch.zeros(2, weight.shape[1]))
        except (AttributeError, RuntimeError) as error:
            raise NotHere("this build of PyTorch has no products in 8 bits here") from error

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        found = torch._int_mm((flat / scale).round().to(torch.int8), self._rounded)
        return torch.addcmul(self._bias, found * scale, self._scale).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._plain)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        return base + self(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))
