"""One heap for all threads, as glibc itself counts them, that keeps its pages, as the kernel counts those."""

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
from server.app import allocator

print(allocator.keep_one_heap() if sys.argv[1] == "keep" else None, flush=True)
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


def environment() -> dict[str, str]:
    """Return this environment without the variables that override the server's choice."""
    return {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}


def heaps(how: str, **variables: str) -> tuple[str, int]:
    """Return the answer of `keep_one_heap`, and the number of heaps once four threads have allocated."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, how],
        cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split(maxsplit=1)[0], done.stdout.count("<heap nr=")


@glibc
def test_threads_keep_one_heap() -> None:
    assert heaps("leave")[1] > 1, "nothing to share: the test shows nothing"
    assert heaps("keep") == ("True", 1)


@glibc
def test_what_the_environment_says_stays() -> None:
    answer, count = heaps("keep", MALLOC_ARENA_MAX="3")
    assert answer == "False"
    assert 1 < count <= 3


FAULTS = """
import resource, sys
from server.app import allocator

if sys.argv[1] == "keep":
    assert allocator.keep_one_heap()

def batch():
    blocks = [bytearray(b"x") * (3 * 2**20) for _ in range(10)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    batch()
before = faults()
for _ in range(20):
    batch()
print((faults() - before) / 20)
"""


@glibc
def test_what_one_batch_frees_the_next_one_has_without_new_pages() -> None:
    def faults(how: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return float(done.stdout)

    assert faults("leave") > 1000, "nothing to keep: the test shows nothing"
    assert faults("keep") < 100
