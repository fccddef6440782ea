"""Forks of the manager: their message, their exit status, their restart, and that they end with their parent."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from server.processes.child import NOT_STARTED, ForkedProcess, SendReady, end_with_parent

pytestmark = pytest.mark.timeout(60)


def status_of(child: ForkedProcess) -> int:
    while (status := child.poll()) is None:
        time.sleep(0.01)
    return status


def read_all(child: ForkedProcess) -> None:
    while child.pipe >= 0:
        child.read_message()


def test_a_fork_is_ready_with_its_message_and_exits_with_its_status() -> None:
    def main(child: ForkedProcess, send_ready: SendReady) -> int:
        send_ready(f"{child.metrics_name == f'engine-{os.getpid()}'} " + "x" * 200_000)
        return 70

    child = ForkedProcess("engine", main)
    child.start()
    read_all(child)
    assert child.ready
    assert child.message == b"True " + b"x" * 200_000
    assert status_of(child) == 70


def test_a_fork_that_raises_is_not_ready_and_runs_nothing_of_the_manager(capfd: pytest.CaptureFixture[str]) -> None:
    def main(child: ForkedProcess, send_ready: SendReady) -> int:
        raise SystemExit(5)

    child = ForkedProcess("front-0", main)
    child.start()
    read_all(child)
    assert not child.ready
    assert status_of(child) == NOT_STARTED


def test_each_restart_waits_longer() -> None:
    child = ForkedProcess("engine", lambda child, send_ready: 0)
    pauses = []
    for _ in range(3):
        child.start()
        assert child.pid
        read_all(child)
        assert status_of(child) == 0
        child.schedule_restart()
        assert not child.pid
        pauses.append(round(child.restart_at - time.monotonic(), 1))
    assert (pauses, child.ends) == ([0.1, 0.2, 0.4], 3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_kernel_ends_a_process_with_its_parent(number: signal.Signals) -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        own = os.getpid()
        if not os.fork():
            end_with_parent(own, number)
            os.write(writing, b".")
            signal.pause()
        signal.pause()
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([reading], [], [], 20)[0], "the pipe closes when the grandchild has ended"
    assert os.read(reading, 1) == b""
    os.close(reading)
