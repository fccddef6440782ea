"""`python -m tests.chaos`: a real server is killed, stopped and cut off while clients check every answer.

    clients ─► server: front ends, engine, workers ─► files + SQLite, or a Redis that is killed and stopped as well
                  ▲ one fault after the other, drawn from the seed
    the ledger holds what was acknowledged, and judges each answer: see `tests.chaos.ledger`

At the end the faults stop; then everything acknowledged must be there, and every job must have ended. Status 1 where
one thing was not as it must be. `--report FILE` writes the figures as a page.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import date
from pathlib import Path

import httpx
import psutil

from server.cli.sample_pictures import draw
from tests.conftest import free_port
from tests.e2e.server_process import serving

from .clients import Clients
from .ledger import Ledger

END_S = 180.0  # for the jobs to end once the faults have stopped
READY_S = 90.0


class Redis:
    """A redis-server of the run's own, which keeps what it acknowledged: every write is on the disk first."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self._options += ["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(["redis-server", *self._options], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Run:
    """A server with its faults; `done` counts them."""

    def __init__(self, home: Path, redis: Redis | None, port: int) -> None:
        self.home, self.redis, self.port = home, redis, port
        self.done: Counter[str] = Counter()
        self._settings = {"fronts": "2", "workers": "1", "lease_s": "5", "stuck_s": "4", "threads": "1"}
        if redis is not None:
            url = f"redis://127.0.0.1:{redis.port}/0"
            self._settings |= {"store": url, "jobs": url}
        self._stack = ExitStack()
        self.start()

    def start(self) -> None:
        self.server = self._stack.enter_context(serving(self.home, port=self.port, **self._settings))

    def close(self) -> None:
        self._stack.close()
        if self.redis is not None:
            self.redis.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def faults(self) -> dict[str, Callable[[random.Random], None]]:
        kinds: dict[str, Callable[[random.Random], None]] = {
            "kill a front end": lambda chance: self._signal("front", signal.SIGKILL, chance),
            "kill the engine": lambda chance: self._signal("engine", signal.SIGKILL, chance),
            "kill the worker": lambda chance: self._signal("worker", signal.SIGKILL, chance),
            "stop a front end": lambda chance: self._signal("front", signal.SIGSTOP, chance),
            "stop the engine": lambda chance: self._signal("engine", signal.SIGSTOP, chance),
            "kill everything": self._kill_all,
        }
        if self.redis is not None:
            kinds |= {"kill Redis": self._kill_redis, "stop Redis": self._stop_redis}
        return kinds

    def _signal(self, name: str, number: signal.Signals, chance: random.Random) -> None:
        """A stopped process is never continued: the manager replaces it."""
        started = self.server.log.splitlines()
        pids = [
            int(line.split("pid ")[1].split()[0].rstrip('",'))
            for line in started
            if f"{name}" in line and ": pid " in line
        ]
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        if alive:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(alive[-2:] if name == "front" else alive[-1:]), number)

    def _kill_all(self, _: random.Random) -> None:
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        self.server.process.kill()
        self.server.process.wait(20)
        _, left = psutil.wait_procs(children, timeout=20)
        if left:
            raise AssertionError(f"{len(left)} processes outlive their killed manager: {left}")
        self.start()

    def _kill_redis(self, chance: random.Random) -> None:
        assert self.redis is not None
        self.redis.stop()
        time.sleep(chance.uniform(0.5, 4))
        self.redis.start()

    def _stop_redis(self, chance: random.Random) -> None:
        assert self.redis is not None
        self.redis.process.send_signal(signal.SIGSTOP)
        time.sleep(chance.uniform(1, 6))
        self.redis.process.send_signal(signal.SIGCONT)


def main() -> int:
    options = _options()
    started, ledger = time.monotonic(), Ledger()
    with tempfile.TemporaryDirectory() as folder:
        redis = Redis(Path(folder)) if options.redis else None
        run = Run(Path(folder) / "home", redis, free_port())
        try:
            clients = _clients(run, ledger, options.seed, Path(folder))
            clients.start()
            _break_things(run, ledger, options.seed, options.minutes * 60)
            clients.join()
            _until_ready(run)
            _verify(run, ledger, clients.jobs)
        finally:
            run.close()
    text = _told(options, ledger, run.done, len(clients.jobs), time.monotonic() - started)
    print(text)
    if options.report:
        options.report.write_text(text)
    return 1 if ledger.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--redis", action="store_true", help="Keep tasks and jobs in a Redis of the run's own.")
    parser.add_argument("--report", type=Path, metavar="FILE")
    return parser.parse_args()


def _clients(run: Run, ledger: Ledger, seed: int, folder: Path) -> Clients:
    draw(folder / "pictures", per_class=4)
    from lensrack import Client

    with Client(run.url) as client:
        dataset = client.datasets.upload(folder / "pictures" / "fruit" / "train").id
    fingerprint = httpx.get(f"{run.url}/readyz").json()["backbone"]["fingerprint"]
    return Clients(ledger, lambda: run.url, fingerprint, dataset, seed)


def _break_things(run: Run, ledger: Ledger, seed: int, seconds: float) -> None:
    chance, end_at, kinds = random.Random(seed), time.monotonic() + seconds, run.faults()
    while time.monotonic() < end_at:
        time.sleep(chance.uniform(1, 6))
        name = chance.choice(sorted(kinds))
        try:
            kinds[name](chance)
        except AssertionError as error:
            ledger.fault(f"{name}: {error}")
            return
        run.done[name] += 1


def _until_ready(run: Run) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{run.url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"the server is not ready {READY_S:g} s after the last fault:\n{run.server.log[-3000:]}")


def _verify(run: Run, ledger: Ledger, jobs: list[str]) -> None:
    """Everything acknowledged is there, and every job ends."""
    with httpx.Client(base_url=run.url, timeout=30) as http:
        for task, (live, stored) in ledger.expected().items():
            answer = http.get(f"/tasks/{task}")
            now = answer.json().get("live") if answer.status_code == 200 else None
            if now not in live:
                ledger.fault(f"{task}: live is {now}, expected one of {live}")
            listed = http.get(f"/tasks/{task}/versions").json().get("versions", [])
            if None not in live and (lost := stored - {info["version"] for info in listed}):
                ledger.fault(f"{task}: lost the acknowledged versions {lost}")
        deadline = time.monotonic() + END_S
        for job in jobs:
            while http.get(f"/train/{job}").json().get("state") not in ("succeeded", "failed", "cancelled"):
                if time.monotonic() > deadline:
                    ledger.fault(f"{job} has not ended: {http.get(f'/train/{job}').text[:300]}")
                    return
                time.sleep(0.5)


def _told(options: argparse.Namespace, ledger: Ledger, done: Counter[str], jobs: int, seconds: float) -> str:
    mode = "Redis" if options.redis else "files and SQLite"
    requests = sum(count for what, count in ledger.counts.items() if what.isdigit())
    rows = [f"| {what} | {count:,} |" for what, count in sorted({**ledger.counts, **done}.items())]
    verdict = (
        ["Nothing was wrong, late, lost or left over."]
        if not ledger.faults
        else [f"- {text}" for text in ledger.faults[:50]]
    )
    head = f"{requests:,} answered requests, {sum(done.values())} injected faults and {jobs} jobs"
    head += f" in {seconds / 60:.1f} minutes"
    command = " ".join(["python -m tests.chaos", *sys.argv[1:]])
    return "\n".join([f"## {mode}, seed {options.seed}, {date.today()}", "", f"`{command}`: {head}.", "",
                      "| answers and injected faults | times |", "|---|---:|", *rows, "", *verdict, ""])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
