"""The containers of the verified deployment: find, inspect, kill and start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

COMPOSE: Final = sys.argv[1:]
PROJECT: Final = os.environ["COMPOSE_PROJECT_NAME"]
LEFT_OUT: Final = os.environ.get("WITHOUT", "").split()
SERVICES: Final = [
    each for each in ("secrets", "redis", "server", "worker", "proxy", "prometheus", "grafana") if each not in LEFT_OUT
]
SOON_S: Final = float(os.environ.get("SOON_S", "600"))
STARTED: Final = time.monotonic()
KEYS: Final = "/run/lensrack-keys"  # in the servers


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def docker(*arguments: str) -> str:
    return run("docker", *arguments)


def compose(*arguments: str) -> str:
    return run(*COMPOSE, *arguments)


def containers(service: str) -> list[str]:
    """Return the ids of a service's containers, running or not, ordered by their numbers."""
    label = f"label=com.docker.compose.service={service}"
    ids = docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}", "--filter", label).split()
    return sorted(ids, key=lambda each: str(inspect(each)["Name"]))


def every() -> list[str]:
    return docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}").split()


def inspect(container: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(docker("inspect", container))
    return found[0]


def name(container: str) -> str:
    return str(inspect(container)["Name"]).strip("/").removeprefix(f"{PROJECT}_").removeprefix(f"{PROJECT}-")


def api_key() -> str:
    """Return the key for everything that the service `secrets` generated."""
    return docker("exec", containers("server")[0], "cat", f"{KEYS}/api_key")


def until(what: str, holds: Callable[[], bool], seconds: float = SOON_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for this: {what}"
        time.sleep(0.2)


def healthy(container: str) -> bool:
    state = inspect(container)["State"]
    return bool(state["Running"]) and state.get("Health", {}).get("Status", "healthy") == "healthy"


# --- how a part breaks ------------------------------------------------------------------------------------------------


def crash(container: str) -> None:
    """Kills the process inside, as a crash would; Docker must restart the container by itself."""
    before = inspect(container)["RestartCount"]
    killer = (
        "import os\nfor p in os.listdir('/proc'):\n if p.isdigit() and 1 < int(p) != os.getpid(): os.kill(int(p), 9)"
    )
    subprocess.run(["docker", "exec", container, "python", "-c", killer], capture_output=True, check=False)
    until(f"{name(container)} is started again", lambda: inspect(container)["RestartCount"] > before)


def kill(container: str) -> None:
    docker("kill", "--signal", "KILL", container)
    assert not inspect(container)["State"]["Running"]


def start(container: str) -> None:
    docker("start", container)
    until(f"{name(container)} is healthy", lambda: healthy(container))
