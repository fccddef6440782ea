"""Another server's process: wait until it answers, and stop it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import httpx

ASK_S = 0.1


def wait_until_well(process: subprocess.Popen[bytes], url: str, most_s: float, log: Callable[[], str] = str) -> None:
    """Wait until `url` answers with success; LitServe's `/health` does so only once its worker is ready.

    Raises RuntimeError, with the end of `log`, if the process ends or the time is over.
    """
    deadline = time.monotonic() + most_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(ASK_S)
    raise RuntimeError(f"{process.args!r} did not start: has that Python all it needs?\n{log()[-2000:]}".rstrip())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the process and all that it has started: a shell's background job ignores SIGINT, and so do its children."""
    import psutil  # of the extra `dev`

    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
