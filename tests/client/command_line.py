"""What runs the command line: in this process, as the console script, in a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(sys.executable).with_name("lensrack")
Run = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


def in_terminal(command: list[object], environment: dict[str, str]) -> tuple[int, str]:
    """Run with a terminal for stderr; the exit code and what was drawn there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=theirs, env={**environment, "TERM": "xterm"}
    )
    os.close(theirs)
    drawn = bytearray()
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux tells the end of a terminal by EIO
            break
        if not chunk:
            break
        drawn += chunk
    os.close(ours)
    return process.wait(30), drawn.decode()
