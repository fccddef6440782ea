"""What a server takes, however many processes it consists of: CPU time and memory of a process and its children."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 2**20


def cpu_s(pid: int) -> float:
    """User and system time of the tree so far. What a child that has ended took is its parent's."""
    return float(sum(sum(each.cpu_times()[:4]) for each in _tree(pid)))


def memory_mib(pid: int) -> float:
    """Proportional set size: pages that several processes share are counted once among them."""
    import psutil

    found = 0
    for each in _tree(pid):
        with suppress(psutil.Error):
            found += each.memory_full_info().pss
    return float(round(found / MIB, 1))


def rss_mib() -> float:
    """Resident memory of this process now."""
    import psutil

    return float(round(psutil.Process().memory_info().rss / MIB, 1))


def peak_rss_mib() -> float:
    """The most that this program has had resident. What `getrusage` says begins with what the parent had."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return round(int(line.split()[1]) / 1024, 1)


def _tree(pid: int) -> list[Any]:
    import psutil  # of the extra `dev`

    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]
