"""Recording work on a device, so that it can be replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

WARM_UP = 3  # runs before a capture, so that libraries have done their lazy initialisation

Work = Callable[[], object]


class Recorder(Protocol):
    def record(self, work: Work) -> Work:
        """Run `work`, which reads and writes memory at fixed addresses, and return a function that does the same again.

        Raises RuntimeError if the device cannot record.
        """
        ...


class Rerun:
    """Records nothing: a replay runs the work itself. For devices without graphs, and for tests."""

    def record(self, work: Work) -> Work:
        work()
        return work


class CudaRecorder:
    """CUDA graphs that share one memory pool: they are never replayed at the same time, so each may reuse the others'
    intermediate memory. Record the largest first; the smaller ones then fit into its pool.

    Other threads may use CUDA during a capture, as the loader of lenses does.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError("there are no graphs on this device")
        self._device = device
        self._side = torch.cuda.Stream(device)  # the default stream cannot be captured
        self._pool: Any = None  # PyTorch's handle of the pool

    def record(self, work: Work) -> Work:
        with torch.cuda.device(self._device), torch.inference_mode():
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                work()
            self._pool = graph.pool()
        return graph.replay

    def _warm_up(self, work: Work) -> None:
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UP):
                work()
        current.wait_stream(self._side)
        torch.cuda.synchronize()
