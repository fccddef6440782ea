"""What a server takes, however many processes it consists of: CPU time and memory of a process and its children.

Memory is what the tree would take alone on the machine. Proportional set size, which is usual, is not: it divides a
page of a library by all processes that have it mapped in, so each server would look the smaller the more of them run
side by side, and those that share a Python with the benchmark smaller than those with one of their own.
Sources: proc_pid_smaps(5), proc_pid_pagemap(5), the kernel's admin-guide/mm/pagemap.
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
IN_MEMORY = ("/memfd:", "/dev/zero", "/dev/shm/", "/SYSV")  # what maps calls shared memory
ENTRY = 8  # bytes of a page's entry in pagemap
MAPPED_IN = np.uint64(1 << 63 | 1 << 61)  # it is in memory, and a page of a file or of shared memory


def cpu_s(pid: int) -> float:
    """User and system time of the tree so far. What a child that has ended took is its parent's."""
    return float(sum(sum(each.cpu_times()[:4]) for each in _tree(pid)))


class Memory(NamedTuple):
    """Of a tree, in MiB: `held` in all; `own`, of that, what is in no file, so that the kernel cannot drop it."""

    held: float
    own: float


def memory(pid: int) -> Memory:
    """The tree's own pages, those that its processes share once; and every page of a file that any of them has mapped
    in, once. Who else has it mapped in changes nothing. Linux only."""
    own_bytes, files = 0, defaultdict[str, list[NDArray[np.int64]]](list)
    for each in _tree(pid):
        gone = () if each.pid == pid else (FileNotFoundError, ProcessLookupError)  # a child may end meanwhile
        with suppress(*gone):
            own_bytes += _own_bytes(each.pid)
            for file, pages in _mapped(each.pid):
                files[file].append(pages)
    once = {file: len(np.unique(np.concatenate(found))) * PAGE for file, found in files.items()}
    shared = sum(size for file, size in once.items() if file.startswith(IN_MEMORY))
    return Memory(round((own_bytes + sum(once.values())) / MIB, 1), round((own_bytes + shared) / MIB, 1))


def _own_bytes(pid: int) -> int:
    """Pages of no file. A fork shares them with its parent, so proportionally: both are of the tree."""
    found = re.search(r"^Pss_Anon: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("expected Pss_Anon in /proc/PID/smaps_rollup: Linux 5.3 or newer")
    return int(found[1]) * 1024


def _mapped(pid: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """By path, device and inode, the places in the file, in pages, of what the process has mapped in of it."""
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
    """The trees stand still meanwhile: a server that polls is no load for the one that is being measured."""
    found = [each for pid in pids for each in _tree(pid)]
    for each in found:
        each.suspend()
    try:
        yield
    finally:
        for each in found:
            each.resume()


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
