"""One heap for all threads, as glibc itself counts them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THREADS = """
import ctypes, sys, threading
from server import allocator

print(allocator.share_one_heap() if sys.argv[1] == "share" else None, flush=True)
all_there = threading.Barrier(4)

def allocate():
    kept = [bytes(2000) for _ in range(200)]
    all_there.wait(60)
    return kept

threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts glibc's heaps")


def told(how: str, **environment: str) -> tuple[str, int]:
    """What `share_one_heap` said, and how many heaps there are once four threads have allocated."""
    plain = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, how],
        cwd=ROOT, env={**plain, **environment}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split(maxsplit=1)[0], done.stdout.count("<heap nr=")


@glibc
def test_threads_share_one_heap() -> None:
    assert told("leave")[1] > 1, "nothing to share: the test shows nothing"
    assert told("share") == ("True", 1)


@glibc
def test_what_the_environment_says_stays() -> None:
    said, heaps = told("share", MALLOC_ARENA_MAX="3")
    assert said == "False"
    assert 1 < heaps <= 3
