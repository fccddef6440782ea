"""How a fit leaves room on a GPU that it shares with the server. On a CPU the process' own priority does that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cap_memory(device: torch.device, share: float) -> None:
    """This process takes at most `share` (0 to 1) of a CUDA device's memory; beyond it an allocation fails."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


@contextmanager
def low_priority(device: torch.device) -> Iterator[None]:
    """What is computed inside runs on a CUDA stream of the lowest priority."""
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
