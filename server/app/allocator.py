"""Settings of glibc's allocator for this process; nothing where the C library is another.

glibc gives threads heaps of their own ("arenas"), and memory that a thread frees stays in its heap. A server's large
blocks are a batch's activations, in the engine's thread, and pictures, in the threads that decode: each heap grew to a
peak of its own. With one heap they share their memory, and no request got slower.

By default glibc returns free memory at the heap's end to the system, and large blocks at once. A forward frees its
activations and allocates as much again a moment later, so the kernel zeroes thousands of pages for each batch, which
shows with a small model. So the heap keeps as much as a batch's activations need, and returns the rest.
Source: mallopt(3), M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
KEPT: Final = 64 * 2**20  # bytes that may lie free at the heap's end
LARGEST: Final = 32 * 2**20  # bytes of a block that comes from the heap: as many as glibc allows
_OVERRIDES: Final = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD")  # the operator has chosen an allocator


def keep_one_heap() -> bool:
    """Have all threads share one heap that keeps its pages; to be called before threads start.

    Return false where the C library is not glibc, or where the environment sets up the allocator.
    """
    if any(name in os.environ for name in _OVERRIDES) or not _is_glibc():
        return False
    libc = ctypes.CDLL(None)
    options = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: KEPT}
    return all(libc.mallopt(option, value) for option, value in options.items())


def hand_back() -> None:
    """Return the heap's free memory to the system, wherever it lies. Source: malloc_trim(3)."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, ValueError, OSError):  # other systems have no such name
        return False
