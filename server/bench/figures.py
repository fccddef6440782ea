"""What the benchmarks say of latencies, and of the machine that they ran on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

from server import __version__


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The nearest rank: a value that was measured. None of nothing. share: 0 … 100."""
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None


def latencies(values: Sequence[float], shares: Sequence[int] = (50, 95, 99)) -> dict[str, float | None]:
    """Milliseconds of so many; None where nothing was answered."""
    ordered = sorted(values)
    found = {f"p{share}_ms": percentile(ordered, share) for share in shares}
    return {name: None if value is None else round(value, 1) for name, value in found.items()}


def machine() -> dict[str, Any]:
    """`load_average` tells of neighbours."""
    import timm
    import torch

    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lensrack": __version__,
        "cuda": torch.cuda.is_available(),
    }
