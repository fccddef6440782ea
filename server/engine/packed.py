"""Frozen linear layers. On a CPU their weights are packed once, in the layout that oneDNN multiplies fastest.

`F.linear` converts the weight's layout in every call, and in float32 it takes MKL's slow path on CPUs that are not
Intel's. A frozen weight can be converted once: same products up to float32 rounding, about twice the speed in float32.
The cost is memory: a packed weight is a second copy, so a process that only serves frees the first
(`Backbone.free_unpacked_weights`); the first backward makes another copy, packed transposed.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTHS = (torch.float32, torch.bfloat16)


class Linear(Protocol):
    """x [..., D] → x · weightᵀ + bias [..., O]. The weight is frozen: gradients flow to x alone."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def product(self, x: Tensor) -> Tensor:
        """The product without the bias, for differences. For a few vectors, when a lens is made."""
        ...

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        """base [..., O] + the product; `base` is not changed."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """The exact GELU of the product (Hendrycks & Gimpel, 2016; with the error function, as in ViTs)."""
        ...


class PlainLinear:
    """PyTorch's product, on any device in any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        return base + self(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x))


class PackedLinear:
    """oneDNN's product with the packed weight. One layout serves any number of rows. Without gradients, a sum or a GELU
    behind the product is computed while its rows are still in the cache; in bfloat16 it is then rounded once instead of
    twice."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self._packed = _pack(weight)
        self._transposed: Tensor | None = None  # weightᵀ, which only training needs

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._bias)

    def product(self, x: Tensor) -> Tensor:
        return self._multiply(x, None)

    def onto(self, base: Tensor, x: Tensor) -> Tensor:
        if recorded(x, base):
            return base + self(x)
        return _multiply_onto(base, x, self._packed, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x)) if recorded(x) else multiply(x, self._packed, self._bias, "gelu")

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return multiply(x, self._packed, bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """Gradient of the output [..., O] → of the input [..., D]: a product with the transposed weight."""
        if self._transposed is None:
            self._transposed = _pack(self._packed.to_dense().t())
        return multiply(gradient, self._transposed, None)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if recorded(x):
            return _Product.apply(x, self, bias)
        return self.forward(x, bias)  # the same bits; with small models autograd's overhead is noticeable


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear, bias: Tensor | None) -> Tensor:
        ctx.linear = linear
        return linear.forward(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.linear.backward(gradient), None, None


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch on this machine multiplies packed weights of this dtype."""
    if device.type != "cpu" or dtype not in WIDTHS or not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x, packed = torch.zeros(1, 16, dtype=dtype), _pack(torch.zeros(16, 16, dtype=dtype))
        _multiply_onto(multiply(x, packed, None, "gelu"), x, packed, None)
        multiply(x, torch.zeros(16, 16, dtype=dtype).t())
    except (AttributeError, RuntimeError, NotImplementedError):  # not public operators: a build may lack them
        return False
    return True


@torch.no_grad()
def _pack(weight: Tensor) -> Tensor:
    """[O, D] → the same numbers in oneDNN's layout, which only `multiply` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """oneDNN's x [..., D] · weightᵀ + bias [O]. weight: packed, or [O, D] with one of its strides 1."""
    x = x.contiguous()  # oneDNN takes strided rows too, at a third of the speed
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")


def _multiply_onto(base: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), base.contiguous(), packed, bias, "add")


def recorded(*inputs: Tensor) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
