"""A CUDA device that is not there: PyTorch's fake tensors have its shapes and its rules, and no numbers.

Whatever needs a number to go on (`.item()`, `.tolist()`, a boolean mask as an index, branching on a tensor) raises in
their mode, for there is none; and `Watch` sees every copy between host and device, and whether the driver could make
it while the host goes on, which takes memory that is pinned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engine import transfer
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.rack import Rack

CUDA = torch.device("cuda", 0)


class WaitsError(AssertionError):
    """The host would wait for the device."""


class Watch(TorchDispatchMode):
    """Counts what crosses, and raises WaitsError at a copy that keeps the host."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.there, self.back = 0, 0
        self._kept: list[Tensor] = []  # so that no storage's number is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self._kept.append(result)
            self.pinned.add(_storage(result))
        name = str(func)
        if name.startswith("aten.copy_"):
            self._see(args[1], args[0], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        elif name.startswith("aten._to_copy"):
            self._see(args[0], result, kwargs.get("non_blocking", False))
        elif isinstance(result, Tensor) and result.device.type == "cuda":
            strangers = [each for each in tensors if each.device.type == "cpu" and each.ndim]
            if strangers:
                raise WaitsError(f"{name} takes {strangers[0]} from the host")
        return result

    def _see(self, source: Tensor, target: Tensor, unwaited: bool) -> None:
        if source.device.type == target.device.type:
            return
        there = target.device.type == "cuda"
        self.there, self.back = self.there + there, self.back + (not there)
        if not unwaited or _storage(source if there else target) not in self.pinned:
            raise WaitsError(f"{source} {'to' if there else 'from'} the device: the host would wait")


class FakeEvent:
    """A stream event of a device that does not exist: there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None: ...

    def set(self) -> None: ...

    def wait(self) -> None: ...


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of pinned memory have no common memory here, and marks no device to wait for: both are stood in for."""

    def block(size: int) -> transfer.Block:
        return transfer.Block(np.empty(size, np.uint8), torch.empty(size, dtype=torch.uint8, pin_memory=True))

    monkeypatch.setattr(Rack, "write", lambda *tensors: None)  # of what has no numbers nothing is to be written
    # in inference mode the fakes are shown composite operators whole, and cannot take them apart
    for name in ("begin", "embed"):
        monkeypatch.setattr(Engine, name, torch.no_grad()(getattr(Engine, name).__wrapped__))
    monkeypatch.setattr(FakeTensor, "numpy", lambda tensor: np.zeros(tensor.shape), raising=False)
    monkeypatch.setattr(transfer, "StreamEvent", FakeEvent)
    monkeypatch.setattr(transfer.Block, "of", block)
    with FakeTensorMode():
        yield


def on_fake_cuda(backbone: Backbone, dtype: torch.dtype = torch.bfloat16, *, float8: bool = False) -> Backbone:
    """The same architecture on the device that is not there; called within `fake_cuda`."""
    model: Any = _replaced(
        copy.copy(backbone.model), lambda tensor: torch.empty(tensor.shape, dtype=dtype, device=CUDA)
    )
    model.__dict__["to"] = lambda **_: model  # it is there already
    return Backbone(backbone.spec, model, CUDA, dtype, packed=True, float8=float8)


def _replaced(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    copied = copy.copy(module)
    copied.__dict__ = {**module.__dict__}
    parameters = {
        name: None if member is None else _frozen(make(member)) for name, member in module._parameters.items()
    }
    buffers = {name: None if member is None else make(member) for name, member in module._buffers.items()}
    copied.__dict__["_parameters"], copied.__dict__["_buffers"] = parameters, buffers
    modules = {name: None if member is None else _replaced(member, make) for name, member in module._modules.items()}
    copied.__dict__["_modules"] = modules
    return copied


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
