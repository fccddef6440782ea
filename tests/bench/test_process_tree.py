"""A server is charged with what all its processes take, and with nothing that others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from server.bench.process_tree import MIB, cpu_s, memory, paused

FILE = OWN = SHARED = 32  # MiB
READER = """
import mmap, os, signal, sys
file = open(sys.argv[1], "rb")
pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
own = bytearray(b"1") * (int(sys.argv[2]) << 20)
shared = mmap.mmap(-1, int(sys.argv[3]) << 20 or 1)
for at in range(0, len(shared), 4096):
    shared[at] = 1
child = os.fork() if int(sys.argv[4]) else -1
seen = sum(pages[::4096]) + sum(own[::4096]) + sum(shared[::4096])
os.write(1, b".")
if child == 0:
    signal.pause()
input()
if child > 0:
    os.kill(child, signal.SIGKILL)
"""


@contextmanager
def reading(file: Path, *, own: int = 0, shared: int = 0, fork: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """A process, with a child or without, that has read all of a file through a mapping and holds so many MiB."""
    command = [sys.executable, "-c", READER, str(file), str(own), str(shared), str(int(fork))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1 + fork) == b"." * (1 + fork)
        yield process
        process.communicate(b"\n")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"1" * FILE * MIB)
    return path


def test_what_several_processes_of_a_tree_share_is_counted_once(file: Path) -> None:
    with reading(file) as bare:
        python_mib = memory(bare.pid).held - FILE
    whole = FILE + OWN + SHARED
    with reading(file, own=OWN, shared=SHARED, fork=True) as process:
        result = memory(process.pid).held
        resident = sum(each.memory_info().rss for each in processes(process.pid)) / MIB
    assert whole <= result <= whole + 2 * python_mib + 4  # what a child has written since is its own
    assert resident >= 2 * whole  # which both have


def test_own_is_what_no_file_holds(file: Path) -> None:
    with reading(file) as bare:
        python_mib = memory(bare.pid).own
    with reading(file, own=OWN, shared=SHARED, fork=True) as process:
        held, own = memory(process.pid)
    assert OWN + SHARED <= own <= OWN + SHARED + 2 * python_mib + 4
    assert held - own >= FILE


def test_who_else_has_a_file_mapped_in_changes_nothing(file: Path) -> None:
    with reading(file, own=1) as process:
        alone, usual = memory(process.pid).held, pss_mib(process.pid)
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(reading(file))
            beside, halved = memory(process.pid).held, pss_mib(process.pid)
    assert abs(alone - beside) < 0.5
    assert usual - halved > FILE / 2  # of four, each has a fourth


def test_a_process_alone_takes_what_it_has_resident(file: Path) -> None:
    with reading(file, own=OWN) as process:
        resident = psutil.Process(process.pid).memory_info().rss / MIB
        assert abs(memory(process.pid).held - resident) < 1  # the kernel's counters lag behind by a few pages


def test_cpu_time_of_children_that_have_ended_counts() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**6))']); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()  # its child has ended
        own = psutil.Process(process.pid).cpu_times()
        assert cpu_s(process.pid) >= own.user + own.children_user > own.user
        process.communicate("\n")


def processes(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def pss_mib(pid: int) -> float:
    return float(sum(each.memory_full_info().pss for each in processes(pid)) / MIB)


def test_a_tree_that_is_paused_takes_no_time_and_goes_on() -> None:
    spin = "import os; os.fork(); exec('while True: pass')"
    with subprocess.Popen([sys.executable, "-c", spin], start_new_session=True) as process:
        try:
            while len(processes(process.pid)) < 2 or cpu_s(process.pid) < 0.2:
                time.sleep(0.05)
            with paused(process.pid):
                still = cpu_s(process.pid)
                time.sleep(0.5)
                assert cpu_s(process.pid) - still < 0.1
            while cpu_s(process.pid) < still + 0.2:
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
