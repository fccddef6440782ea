"""A server of the benchmark's own: a real process with its worker, on a free port, in a home that is thrown away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0  # a large backbone may be on its way from a disk
STOP_S = 40.0


@contextmanager
def own_server(
    module: str = "server", store: str = "", settings: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Path, int]]:
    """Its URL, its home and its process. LENSRACK_ settings of the environment hold, except for where it lies and
    listens. `module`: what is run with the command line of `python -m server`; `store`: another's URL;
    `settings`: others, by the names of their environment variables."""
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as folder:
        home = Path(folder)
        with (home / "server.log").open("wb") as log:
            command = [sys.executable, "-m", module, "serve", "--host", "127.0.0.1", "--port", "0"]
            env = {**_environment(home, store), **(settings or {})}
            process = subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=log)
        try:
            url = _url(process, home / "server.log")
            yield url, home, process.pid
        finally:
            _stop(process)


def _environment(home: Path, store: str) -> dict[str, str]:
    own = {"LENSRACK_HOME": str(home), "LENSRACK_STORE": store, "LENSRACK_JOBS": ""}
    return {**environment(), **own}


def environment() -> dict[str, str]:
    """What every process of a benchmark is given, ours and a peer's: all of this one's, settings and the allocator's
    variables among it, and the way to the packages. Idle threads sleep, as `python -m server` has them do."""
    path = filter(None, (str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH")))
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, as its log says, once it is ready."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if (found := re.search(r"serving on (http://\S+)", log.read_text(errors="replace"))) and _ready(found[1]):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
