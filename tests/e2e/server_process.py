"""A real server process with its worker, on a free port, in a home of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
START_S = 90


@dataclass
class ServerProcess:
    """`url` answers; `log` holds what the server and its worker have said so far."""

    process: subprocess.Popen[bytes]
    url: str
    home: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """As an operator would; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


def environment(home: Path, settings: Mapping[str, str], installed: Sequence[Path] = ()) -> dict[str, str]:
    """The machine's environment without lensrack settings of its own, and ours; the backbone is the small stand-in.

    installed: folders of packages.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("LENSRACK_")}
    path = os.pathsep.join((str(Path(sys.executable).parent), own.get("PATH", "")))
    return {
        **own,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "client", *installed))),
        "LENSRACK_HOME": str(home),
        "LENSRACK_BACKBONE": "untrained",
        **{f"LENSRACK_{key.upper()}": value for key, value in settings.items()},
    }


@contextmanager
def serving(home: Path, *, port: int = 0, installed: Sequence[Path] = (), **settings: str) -> Iterator[ServerProcess]:
    """Start `python -m server serve`, wait until it is ready, and stop it afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    log_file = home / "server.log"
    said_before = log_file.stat().st_size if log_file.exists() else 0
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", str(port)],
            env=environment(home, settings, installed),
            stdout=log,
            stderr=log,
            cwd=home,
        )
    try:
        server = ServerProcess(process, _url(process, log_file, said_before), home, log_file)
        _wait_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _url(process: subprocess.Popen[bytes], log_file: Path, said_before: int) -> str:
    """Where it listens, as its log says; what an earlier server said into the same log does not count."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        text = log_file.read_bytes()[said_before:].decode(errors="replace")
        if found := re.search(r"serving on (http://[\w.:\[\]]+)", text):
            return found[1]
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{text[-3000:]}")
        time.sleep(0.05)
    raise AssertionError(f"the server did not start within {START_S} s:\n{log_file.read_text()[-3000:]}")


def _wait_ready(server: ServerProcess) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready within {START_S} s:\n{server.log[-3000:]}")
