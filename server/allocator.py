"""How this process takes memory from the system: glibc's allocator, where that is what there is.

glibc gives threads heaps of their own ("arenas"), and what a thread has freed stays in its heap. A server's large
blocks are a batch's activations, in the engine's thread, and pictures, in those that decode: each heap grew to its own
peak. In one heap they share their memory, and no request got slower. (Handing every large block back at once, by
M_MMAP_THRESHOLD, saves little more and costs half as much CPU time again: all its pages have to be zeroed anew.)
Source: mallopt(3), M_ARENA_MAX.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

M_ARENA_MAX: Final = -8
_SAID_OTHERWISE: Final = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD")  # somebody has chosen: theirs stays


def share_one_heap() -> bool:
    """Before threads are at work. False where there is no glibc, or where the environment says otherwise."""
    if any(name in os.environ for name in _SAID_OTHERWISE) or not _glibc():
        return False
    return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))


def _glibc() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, ValueError, OSError):  # no such name elsewhere
        return False
