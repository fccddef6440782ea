"""Copies between host and device for one batch, arranged so that the host waits only for the answers.

    pixels, numbers ─► pinned memory ─copy─► device … one forward … ─copy─► pinned memory ─event─► logits

A copy from memory that the driver has not pinned blocks the host until everything before it on the stream has run, and
a batch brings dozens of small tables. On CUDA they are therefore staged in pinned memory, which is allocated once and
reused by later batches, and the host continues. On a CPU nothing is copied: arrays are wrapped as tensors.

A transfer belongs to one batch, from `take` until the function that `start_fetch` returned has been called; several may
be in flight.
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
ALIGNED = 64  # bytes: each array of a block starts at a multiple
SMALLEST = 2**20  # bytes of the smallest block


class Transfer(Protocol):
    """The copies of one batch to the device and back."""

    def send(self, array: Array) -> Tensor:
        """Return the array on the device. The tensor may share the array's memory: do not write to it."""
        ...

    def stack(self, arrays: Sequence[Array]) -> Tensor:
        """Arrays of one shape and dtype, stacked, on the device."""
        ...

    def fill(self, target: Tensor, arrays: Sequence[Array]) -> None:
        """Copy the stacked arrays into the first rows of `target`, which is on the device and keeps its address."""
        ...

    def put(self, target: Tensor, array: Array) -> None:
        """Copy an array of the same shape into `target`, which is on the device and keeps its address."""
        ...

    def start_fetch(self, result: Tensor) -> Callable[[], Tensor]:
        """Start copying a result to the host. The returned function waits for the copy and ends the batch."""
        ...


class DirectTransfer:
    """PyTorch's own copies, to any device. On a CPU there are none; elsewhere the host waits for each."""

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

    def start_fetch(self, result: Tensor) -> Callable[[], Tensor]:
        return result.cpu


class TransferPool:
    """Lends a transfer to each batch; it comes back when the batch's answers have been fetched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[PinnedTransfer] = []

    def take(self) -> Transfer:
        if self._device.type != "cuda":
            return DirectTransfer(self._device)
        return self._free.pop() if self._free else PinnedTransfer(self._device, self._free.append)


@dataclass(frozen=True)
class Block:
    """Bytes of host memory that the driver has pinned: `array` and `tensor` share the memory."""

    array: NDArray[np.uint8]
    tensor: Tensor

    @classmethod
    def of(cls, size: int) -> Block:
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return cls(tensor.numpy(), tensor)


class StreamEvent:
    """A point on the device's stream that the host can wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.Event()

    def set(self) -> None:
        """Place the event behind everything launched so far."""
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.synchronize()


class PinnedTransfer:
    """Copies through pinned blocks. A batch that needs more memory gets an additional block; afterwards one block of
    the total size replaces them, so that nothing is allocated after the largest batch.

    No byte of a block is written again before the event behind the batch's last copy, so no copy reads another batch's
    numbers; on the device every batch has memory of its own, in stream order.
    """

    def __init__(self, device: torch.device, give_back: Callable[[PinnedTransfer], None]) -> None:
        self._device, self._give_back = device, give_back
        self._event = StreamEvent(device)
        self._blocks: list[Block] = []
        self._used = 0  # bytes of the last block

    def send(self, array: Array) -> Tensor:
        return self._staged(array).to(self._device, non_blocking=True)

    def stack(self, arrays: Sequence[Array]) -> Tensor:
        return self._staged_stack(arrays).to(self._device, non_blocking=True)

    def fill(self, target: Tensor, arrays: Sequence[Array]) -> None:
        target[: len(arrays)].copy_(self._staged_stack(arrays), non_blocking=True)

    def put(self, target: Tensor, array: Array) -> None:
        target.copy_(self._staged(array), non_blocking=True)

    def start_fetch(self, result: Tensor) -> Callable[[], Tensor]:
        size = result.numel() * result.element_size()
        _, raw = self._allocate((size,), np.dtype(np.uint8))
        host = raw.view(result.dtype).view(result.shape)
        host.copy_(result, non_blocking=True)
        self._event.set()
        return lambda: self._wait(host)

    def _wait(self, host: Tensor) -> Tensor:
        self._event.wait()
        result = host.clone()  # the next batch overwrites the block
        if len(self._blocks) > 1:
            self._blocks = [Block.of(sum(len(block.array) for block in self._blocks))]
        self._used = 0
        self._give_back(self)
        return result

    def _staged(self, array: Array) -> Tensor:
        host, tensor = self._allocate(array.shape, array.dtype)
        host[...] = array
        return tensor

    def _staged_stack(self, arrays: Sequence[Array]) -> Tensor:
        host, tensor = self._allocate((len(arrays), *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=host)
        return tensor

    def _allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[Array, Tensor]:
        """Memory for an array in the last block, as an array and as a tensor."""
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
