"""A temporary server: a real process with its worker, on a free port, with a home that is deleted afterwards."""

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
START_S = 300.0  # loading a large backbone from disk may take long
STOP_S = 40.0


@contextmanager
def temporary_server(
    module: str = "server", store: str = "", settings: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Path, int]]:
    """Yield its URL, its home and its process id. LENSRACK_ settings of the environment apply, except for its home and
    address. `module`: what is run with the command line of `python -m server`; `store`: URL of another store;
    `settings`: additional settings, by the names of their environment variables."""
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
    storage = {"LENSRACK_HOME": str(home), "LENSRACK_STORE": store, "LENSRACK_JOBS": ""}
    return {**environment(), **storage}


def environment() -> dict[str, str]:
    """The environment of every benchmark process, ours and a peer's: this process's, including settings and the
    allocator's variables, and the path to the packages. Idle threads sleep, as `python -m server` makes them."""
    path = filter(None, (str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH")))
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The server's address from its log, once the server is ready."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if (match := re.search(r"serving on (http://\S+)", log.read_text(errors="replace"))) and _ready(match[1]):
            return match[1]
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
