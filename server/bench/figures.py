"""Latency percentiles, and a description of the machine that a benchmark ran on."""

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
    """The nearest rank, which is a measured value; None without values. share: 0 … 100."""
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None


def latencies(values: Sequence[float], shares: Sequence[int] = (50, 95, 99)) -> dict[str, float | None]:
    """Percentiles in milliseconds; None without values."""
    ordered = sorted(values)
    percentiles = {f"p{share}_ms": percentile(ordered, share) for share in shares}
    return {name: None if value is None else round(value, 1) for name, value in percentiles.items()}


def machine() -> dict[str, Any]:
    """The machine and the versions. `load_average` shows other load."""
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
    """The processor's name, if the system provides it (proc_cpuinfo(5)), else its architecture."""
    try:
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return f"{name[1].strip()} ({platform.machine()})" if name else platform.machine()
