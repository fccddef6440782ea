"""What crosses between host and device for one batch, so that nobody waits but the one who wants the answers.

    pixels, numbers ─► pinned memory ─copy─► device … one forward … ─copy─► pinned memory ─event─► logits

A copy from memory that the driver has not pinned keeps the host until everything before it on the stream has run, and a
batch brings dozens of small tables. On CUDA they are therefore laid into pinned memory, which is taken once and used
again by later batches, and the host goes on. On a CPU nothing crosses: arrays are tensors as they are.

A crossing belongs to one batch from `take` to the end of its `arrived`; several may be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
ALIGNED = 64  # bytes: where each array of a block begins
SMALLEST = 2**20  # bytes of a block


class Transfer(Protocol):
    """One batch's way to the device and back."""

    def send(self, array: Array) -> Tensor:
        """The array on the device. It may be a view of the array itself: leave that as it is."""
        ...

    def stack(self, arrays: Sequence[Array]) -> Tensor:
        """Arrays of one shape and dtype, stacked, on the device."""
        ...

    def fill(self, target: Tensor, arrays: Sequence[Array]) -> None:
        """Copy the stacked arrays into the first of `target`, which lies on the device and stays where it is."""
        ...

    def put(self, target: Tensor, array: Array) -> None:
        """Copy an array of its shape into `target`, which lies on the device and stays where it is."""
        ...

    def arrive(self, found: Tensor) -> Callable[[], Tensor]:
        """Start to fetch what the device finds. What is returned waits for it; then the batch is over."""
        ...


class DirectTransfer:
    """To any device with PyTorch's own copies. On a CPU there are none; elsewhere the host waits for each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def stack(self, arrays: Sequence[Array]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self._device)

    def fill(self, target: Tensor, arrays: Sequence[Array]) -> None:
        target[: len(arrays)].copy_(torch.from_numpy(np.stack(arrays)))

    def put(self, target: Tensor, array: Array) -> None:
        target.copy_(torch.from_numpy(array))

    def arrive(self, found: Tensor) -> Callable[[], Tensor]:
        return found.cpu


class TransferPool:
    """Hands out a crossing for each batch, and takes it back when its answers have arrived."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[PinnedTransfer] = []

    def take(self) -> Transfer:
        if self._device.type != "cuda":
            return DirectTransfer(self._device)
        return self._free.pop() if self._free else PinnedTransfer(self._device, self._free.append)


@dataclass(frozen=True)
class Block:
    """Host memory that the driver has pinned, as bytes: `array` and `tensor` are the same memory."""

    array: NDArray[np.uint8]
    tensor: Tensor

    @classmethod
    def of(cls, size: int) -> Block:
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return cls(tensor.numpy(), tensor)


class StreamEvent:
    """A place on the device's stream that the host can wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.Event()

    def set(self) -> None:
        """Behind all that was launched so far."""
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.synchronize()


class PinnedTransfer:
    """Through pinned blocks. Where a batch brings more than they hold it gets one more, and the next batch gets one
    block of that size: after the largest batch nothing is allocated any more.

    Nothing of a block is written again before the event behind the batch's last copy, so no copy reads another batch's
    numbers; on the device every batch has memory of its own, in the order of the stream.
    """

    def __init__(self, device: torch.device, over: Callable[[PinnedTransfer], None]) -> None:
        self._device, self._over = device, over
        self._mark = StreamEvent(device)
        self._blocks: list[Block] = []
        self._used = 0  # bytes of the last block

    def send(self, array: Array) -> Tensor:
        return self._laid(array).to(self._device, non_blocking=True)

    def stack(self, arrays: Sequence[Array]) -> Tensor:
        return self._stacked(arrays).to(self._device, non_blocking=True)

    def fill(self, target: Tensor, arrays: Sequence[Array]) -> None:
        target[: len(arrays)].copy_(self._stacked(arrays), non_blocking=True)

    def put(self, target: Tensor, array: Array) -> None:
        target.copy_(self._laid(array), non_blocking=True)

    def arrive(self, found: Tensor) -> Callable[[], Tensor]:
        size = found.numel() * found.element_size()
        _, room = self._room((size,), np.dtype(np.uint8))
        host = room.view(found.dtype).view(found.shape)
        host.copy_(found, non_blocking=True)
        self._mark.set()
        return lambda: self._wait(host)

    def _wait(self, host: Tensor) -> Tensor:
        self._mark.wait()
        own = host.clone()  # the block is the next batch's
        if len(self._blocks) > 1:
            self._blocks = [Block.of(sum(len(block.array) for block in self._blocks))]
        self._used = 0
        self._over(self)
        return own

    def _laid(self, array: Array) -> Tensor:
        host, tensor = self._room(array.shape, array.dtype)
        host[...] = array
        return tensor

    def _stacked(self, arrays: Sequence[Array]) -> Tensor:
        host, tensor = self._room((len(arrays), *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=host)
        return tensor

    def _room(self, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[Array, Tensor]:
        """Room for an array, seen from both sides."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        start = -(-self._used // ALIGNED) * ALIGNED
        if not self._blocks or start + size > len(self._blocks[-1].array):
            self._blocks.append(Block.of(max(size, SMALLEST)))
            start = 0
        self._used = start + size
        block, part = self._blocks[-1], slice(start, start + size)
        host: Array = block.array[part].view(dtype).reshape(shape)
        return host, block.tensor[part].view(_torch_dtype(dtype)).view(tuple(shape))


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
