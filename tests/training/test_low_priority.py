"""A fit leaves the server room: on CUDA a stream of the lowest priority and a cap on memory; on a CPU neither acts."""

from __future__ import annotations

import pytest
import torch

from server.training.low_priority import cap_memory, low_priority

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_on_a_cpu_nothing_of_cuda_is_touched() -> None:
    cap_memory(CPU, 0.5)
    with low_priority(CPU):
        assert torch.ones(2).sum().item() == 2
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()


@cuda
def test_the_fit_runs_on_a_stream_of_the_lowest_priority_and_what_follows_waits_for_it() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.current_stream(device)
    with low_priority(device):
        inside = torch.cuda.current_stream(device)
        found = torch.ones(1000, 1000, device=device) @ torch.ones(1000, 1000, device=device)
    assert inside != before
    assert inside.priority == torch.cuda.Stream.priority_range()[0]  # type: ignore[call-arg]
    assert torch.cuda.current_stream(device) == before
    assert found.sum().item() == 1000**3


@cuda
def test_memory_beyond_the_share_is_refused() -> None:
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    cap_memory(device, 0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(total // 20, dtype=torch.uint8, device=device)
    finally:
        cap_memory(device, 1.0)
