"""A worker leaves with its server, also one that hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAVING = """
import threading, time
from server.cli.work import leave_with_parent
stop, ready = threading.Event(), threading.Event()
{ready}
threading.Thread(target=leave_with_parent, args=(stop, ready, {grace_s}), daemon=True).start()
print(stop.wait(60), flush=True)
time.sleep({works_on_s})
"""


def left(*, grace_s: float, works_on_s: float, ready: str = "ready.set()") -> tuple[str, int]:
    code = LEAVING.format(grace_s=grace_s, works_on_s=works_on_s, ready=ready)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    return done.stdout.strip(), done.returncode


def test_a_worker_whose_input_closes_is_told_to_stop() -> None:
    assert left(grace_s=60, works_on_s=0) == ("True", 0)


def test_a_worker_that_still_starts_leaves_at_once() -> None:
    assert left(grace_s=60, works_on_s=60, ready="") == ("", 0)


def test_a_worker_that_does_not_stop_is_killed() -> None:
    assert left(grace_s=0.1, works_on_s=60) == ("True", -signal.SIGKILL)
