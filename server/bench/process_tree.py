"""CPU time and memory of a server, however many processes it consists of: of a process and its children.

Memory is what the tree would use alone on the machine. Proportional set size, the usual figure, is not: it divides a
page of a library by all processes that have it mapped, so each server would look smaller the more of them run side by
side, and those that share a Python with the benchmark smaller than those with their own. Sources: proc_pid_smaps(5),
proc_pid_pagemap(5), the kernel's admin-guide/mm/pagemap.
"""

from __future__ import annotations

import mmap
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIB = 2**20
PAGE = mmap.PAGESIZE
IN_MEMORY = ("/memfd:", "/dev/zero", "/dev/shm/", "/SYSV")  # names of shared memory in /proc/PID/maps
ENTRY = 8  # bytes per page in pagemap
MAPPED_IN = np.uint64(1 << 63 | 1 << 61)  # bits: present in memory; a page of a file or of shared memory


def cpu_s(pid: int) -> float:
    """User and system time of the tree so far. The time of a child that has ended counts for its parent."""
    return float(sum(sum(each.cpu_times()[:4]) for each in _tree(pid)))


class Memory(NamedTuple):
    """Memory of a tree in MiB: `held` in total; `own`, the part that is in no file, so that the kernel cannot drop
    it."""

    held: float
    own: float


def memory(pid: int) -> Memory:
    """The tree's anonymous pages, counting shared ones once, plus every file page that any of its processes has mapped,
    once. Mappings of other processes change nothing. Linux only."""
    own_bytes, files = 0, defaultdict[str, list[NDArray[np.int64]]](list)
    for each in _tree(pid):
        gone = () if each.pid == pid else (FileNotFoundError, ProcessLookupError)  # a child may end meanwhile
        with suppress(*gone):
            own_bytes += _own_bytes(each.pid)
            for file, pages in _mapped(each.pid):
                files[file].append(pages)
    once = {file: len(np.unique(np.concatenate(pages))) * PAGE for file, pages in files.items()}
    shared = sum(size for file, size in once.items() if file.startswith(IN_MEMORY))
    return Memory(round((own_bytes + sum(once.values())) / MIB, 1), round((own_bytes + shared) / MIB, 1))


def _own_bytes(pid: int) -> int:
    """Anonymous pages. A fork shares them with its parent, so proportionally: both belong to the tree."""
    match = re.search(r"^Pss_Anon: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError("expected Pss_Anon in /proc/PID/smaps_rollup: Linux 5.3 or newer")
    return int(match[1]) * 1024


def _mapped(pid: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """By path, device and inode: the file offsets, in pages, that the process has mapped."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as table:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, _, offset, device, inode, *path = line.split(maxsplit=5)
            if inode != "0":  # of a file or of shared memory
                start, end = (int(address, 16) // PAGE for address in span.split("-"))
                table.seek(start * ENTRY)
                entries = np.frombuffer(table.read((end - start) * ENTRY), np.uint64)
                yield (
                    f"{path[0]} {device} {inode}",
                    np.flatnonzero(entries & MAPPED_IN == MAPPED_IN) + int(offset, 16) // PAGE,
                )


@contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Suspend the trees meanwhile, so that servers that poll are no load for the one that is measured."""
    processes = [each for pid in pids for each in _tree(pid)]
    for each in processes:
        each.suspend()
    try:
        yield
    finally:
        for each in processes:
            each.resume()


def rss_mib() -> float:
    """Resident memory of this process now."""
    import psutil

    return float(round(psutil.Process().memory_info().rss / MIB, 1))


def peak_rss_mib() -> float:
    """The peak resident memory of this program. `getrusage` would start with the parent's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return round(int(line.split()[1]) / 1024, 1)


def _tree(pid: int) -> list[Any]:
    import psutil  # of the extra `dev`

    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]
