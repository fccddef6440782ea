"""Those who use a server during a chaos run: they ask, publish, delete and train, and tell the ledger all of it."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import httpx
from PIL import Image

from prompts_store import Bundle

from .ledger import Ledger, bundle

TASKS: Final = tuple(f"task-{number}" for number in range(4))
TIMEOUT_S: Final = 40.0
LONGEST_S: Final = 35.0  # LENSRACK_REQUEST_TIMEOUT_S and what a busy machine adds
REFUSED: Final = frozenset({429, 502, 503, 504, 507})  # each says so truly: nothing was answered
PNG: Final = {"content-type": "image/png"}


def picture(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (32, 32), grey).save(file, "PNG")
    return file.getvalue()


class Clients:
    """Threads against the server at `url()`, which may move, until `stop`."""

    def __init__(self, ledger: Ledger, url: Callable[[], str], fingerprint: str, dataset: str, seed: int) -> None:
        self.ledger, self._url, self._fingerprint, self._dataset = ledger, url, fingerprint, dataset
        self.stop = threading.Event()
        self.jobs: list[str] = []
        readers = [(self._read, random.Random(f"{seed} reader {n}")) for n in range(3)]
        writers = [(self._write, random.Random(f"{seed} writer {n}")) for n in range(len(TASKS))]
        self._threads = [
            threading.Thread(target=self._until_stop, args=(work, chance, number), daemon=True)
            for number, (work, chance) in enumerate([*readers, *writers, (self._train, random.Random(f"{seed} jobs"))])
        ]
        self._readers = len(readers)
        self._stored: dict[str, list[Bundle]] = {task: [] for task in TASKS}

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)
            if thread.is_alive():
                self.ledger.fault(f"{thread.name} got no answer within {2 * TIMEOUT_S:g} s")

    def _until_stop(
        self, work: Callable[[httpx.Client, random.Random, str], None], chance: random.Random, n: int
    ) -> None:
        task = TASKS[(n - self._readers) % len(TASKS)]
        with httpx.Client(timeout=TIMEOUT_S) as http:
            while not self.stop.is_set():
                try:
                    work(http, chance, task)
                except httpx.ReadTimeout:
                    self.ledger.fault(f"a request got no answer within {TIMEOUT_S:g} s")
                except httpx.TransportError as error:
                    self.ledger.count(f"no connection ({type(error).__name__})")
                    time.sleep(0.1)

    def _sent(self, http: httpx.Client, method: str, path: str, **options: object) -> httpx.Response:
        started = time.monotonic()
        answer = http.request(method, f"{self._url()}{path}", **options)  # type: ignore[arg-type]
        self.ledger.count(f"{answer.status_code}")
        if time.monotonic() - started > LONGEST_S:
            self.ledger.fault(f"{method} {path} was answered after {time.monotonic() - started:.0f} s")
        if answer.status_code >= 500 and answer.status_code not in REFUSED:
            self.ledger.fault(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer

    def _read(self, http: httpx.Client, chance: random.Random, _: str) -> None:
        task, asked_at = chance.choice(TASKS), time.monotonic()
        answer = self._sent(http, "POST", f"/predict/{task}", content=picture(chance.randrange(256)), headers=PNG)
        if answer.status_code == 200:
            self.ledger.check(task, asked_at, answer.json())
        elif answer.status_code == 404:
            self.ledger.check_absent(task, asked_at)

    def _write(self, http: httpx.Client, chance: random.Random, task: str) -> None:
        """One change of the writer's own task; changes of which the outcome is unknown are made again until it is."""
        stored = self._stored[task]
        if len(stored) < 3 or chance.random() < 0.4:
            new = bundle(task, chance.randrange(10**9), self._fingerprint)
            self.ledger.will_store(new)
            self._change(http, task, new.version, "PUT", f"/tasks/{task}/versions?alias=live", content=new.data)
            stored.append(new)
        elif chance.random() < 0.1:
            self._change(http, task, None, "DELETE", f"/tasks/{task}")
            stored.clear()
        else:
            version = chance.choice(stored).version
            self._change(http, task, version, "PUT", f"/tasks/{task}/aliases/live", json={"version": version})
        self.stop.wait(chance.uniform(0.2, 1.5))

    def _change(self, http: httpx.Client, task: str, live: str | None, method: str, path: str, **body: object) -> None:
        headers = {"content-type": "application/octet-stream"} if "content" in body else {}
        with self.ledger.changing(task, live) as acknowledged:
            while True:
                try:
                    answer = self._sent(http, method, path, headers=headers, **body)
                except httpx.TransportError:
                    answer = None
                gone = method == "DELETE" and answer is not None and answer.status_code == 404
                if answer is not None and (answer.status_code < 300 or gone):
                    acknowledged()
                    return
                if answer is not None and answer.status_code not in REFUSED:
                    self.ledger.fault(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
                    return
                if self.stop.wait(0.3):
                    return

    def _train(self, http: httpx.Client, chance: random.Random, _: str) -> None:
        ask = {"task": "trained", "dataset": self._dataset, "method": "linear", "recipe": {"epochs": 3}}
        answer = self._sent(http, "POST", "/train", json=ask)
        if answer.status_code == 202:
            self.jobs.append(answer.json()["id"])
            if chance.random() < 0.3:
                self._sent(http, "POST", f"/train/{self.jobs[-1]}/cancel")
        self.stop.wait(chance.uniform(2, 5))
