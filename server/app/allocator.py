"""How this process takes memory from the system: glibc's allocator, where that is what there is.

glibc gives threads heaps of their own ("arenas"), and what a thread has freed stays in its heap. A server's large
blocks are a batch's activations, in the engine's thread, and pictures, in those that decode: each heap grew to its own
peak. In one heap they share their memory, and no request got slower.

What lies free at the heap's end goes back to the system, and large blocks at once; a forward frees its activations and
takes as much again in the next moment. Its pages then have to be zeroed anew, thousands of them a batch, which a
small model feels. So the heap keeps as much as a batch's activations come to, and gives back what is beyond.
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
_SAID_OTHERWISE: Final = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD")  # somebody has chosen: theirs stays


def keep_one_heap() -> bool:
    """Before threads are at work. False where there is no glibc, or where the environment says otherwise."""
    if any(name in os.environ for name in _SAID_OTHERWISE) or not _glibc():
        return False
    libc = ctypes.CDLL(None)
    wanted = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: KEPT}
    return all(libc.mallopt(what, value) for what, value in wanted.items())


def hand_back() -> None:
    """Give the system what lies free in the heap, wherever it lies. Source: malloc_trim(3)."""
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, ValueError, OSError):  # no such name elsewhere
        return False
