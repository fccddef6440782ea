"""Limits a fit's share of a GPU that the server uses too. On a CPU the priority of the process does that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cap_memory(device: torch.device, share: float) -> None:
    """Limit this process to `share` (0 to 1) of a CUDA device's memory; allocations beyond it fail."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


@contextmanager
def low_priority(device: torch.device) -> Iterator[None]:
    """Run the computations of the `with` block on a CUDA stream of the lowest priority."""
    if device.type != "cuda":
        yield
        return
    lowest, _ = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # static, whatever the stub says
    before = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device, priority=lowest)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)
