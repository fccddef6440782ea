"""Alternative computations of a frozen block that the engine does not use, measured by `bench ladder`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from server.engine.block import FrozenBlock
from server.engine.packed import PackedLinear

from .ladder_bench import NotAvailable


class Separate(FrozenBlock):
    """Sums and GELU as separate operations."""

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        result: Tensor = x + self.ls1(self.project(mixed))
        return result

    def after_mlp(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.ls2(self.behind_hidden(self.hidden(self.norm2(x))))
        return result


class OneProduct(FrozenBlock):
    def __init__(self, block: Block, *, packed: bool) -> None:
        super().__init__(block, packed=packed)
        self._qkv = PackedLinear(block.attn.qkv.weight, block.attn.qkv.bias)


class Int8Linear:
    """Weights in 8 bits with one scale per output; x in 8 bits with one scale per row, computed in every call."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._scale = weight.abs().amax(1).clamp_min(1e-8) / 127
        self._rounded = (weight / self._scale[:, None]).round().to(torch.int8).t()
        self._bias, self._plain = bias, weight
        try:
            self(torch.zeros(2, weight.shape[1]))
        except (AttributeError, RuntimeError) as error:
            raise NotAvailable("this build of PyTorch has no products in 8 bits here") from error

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        product = torch._int_mm((flat / scale).round().to(torch.int8), self._rounded)
        return torch.addcmul(self._bias, product * scale, self._scale).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._plain)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        return base + self(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))
