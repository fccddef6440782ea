"""Who records a piece of work on a device, so that it is launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

WARM_UP = 3  # runs before a capture: what libraries set up when they are first used must be there

Work = Callable[[], object]


class Recorder(Protocol):
    def record(self, work: Work) -> Work:
        """Run `work`, which reads and writes memory that stays where it is, and return what does the same again.

        Raises RuntimeError where the device cannot.
        """
        ...


class Rerun:
    """Records nothing: the work itself is what is run again. For devices without graphs, and for tests."""

    def record(self, work: Work) -> Work:
        work()
        return work


class CudaRecorder:
    """CUDA graphs out of one memory pool: they are never replayed at the same time, so what one of them needs in
    between the others may use. Record the largest first, and those after it find their memory in the pool.

    Other threads may go on with CUDA meanwhile, as the loader of lenses does.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError("there are no graphs on this device")
        self._device = device
        self._side = torch.cuda.Stream(device)  # the default stream cannot be captured
        self._pool: Any = None  # what PyTorch calls a pool's handle

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
