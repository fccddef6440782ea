"""What the benchmarks say of latencies, and of the machine that they ran on."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
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
        "processor": processor(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lensrack": __version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """By its name, where the system tells (proc_cpuinfo(5)), else by its kind."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1].strip()} ({platform.machine()})" if found else platform.machine()
