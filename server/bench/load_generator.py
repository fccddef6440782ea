"""Sends requests from a separate process, so that the client does not wait for the server's process.

A plan arrives as JSON on stdin, the result leaves as JSON on stdout. Closed loop (no `rate`): `clients` clients, each
sending its next request after its last answer; the server sets the pace. Open loop: requests are due by a Poisson
process of `rate` a second, whether or not earlier ones are answered, like those of many independent users; each takes
an idle connection or a new one. A latency counts from the moment the request was due, so that a late request does not
hide a late answer (coordinated omission). If a plan names `tasks`, each request is for one of them, drawn by their
`shares`. Raw sockets and standard library only: on two cores a comfortable client would take the server's share.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ANSWER_S = 120.0  # beyond the server's own time limit
NO_ANSWER = 0  # instead of a status
OPENING = 256  # connections that are opened concurrently, well below the server's backlog


@dataclass(frozen=True)
class Plan:
    """`seconds` and `requests` both limit the run, whichever is reached first; 0: no limit.

    `{task}` in `path` and `picture` stands for the task of the request; `shares` are weights, empty for equal ones.
    """

    host: str
    port: int
    path: str
    picture: str  # a file: the body
    content_type: str
    seconds: float = 0.0
    requests: int = 0
    clients: int = 1
    rate: float = 0.0  # requests a second; 0: closed loop
    seed: int = 0
    tasks: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()


class Answer(NamedTuple):
    """Times in seconds since the start."""

    due_s: float
    sent_s: float
    done_s: float
    status: int
    retry_after: str | None
    task: int = 0  # its index among the plan's tasks


@dataclass
class LoadResult:
    answers: list[Answer]
    cpu_s: float  # the generator's own
    connections: int  # opened in all


def generate(plan: Plan) -> LoadResult:
    """Run the plan in a separate process. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(
        command, input=json.dumps(asdict(plan)), capture_output=True, text=True, check=False, cwd=_root()
    )
    if done.returncode:
        raise RuntimeError(f"the load generator ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    return LoadResult([Answer(*answer) for answer in result["answers"]], result["cpu_s"], result["connections"])


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


class Connection:
    """One kept-alive HTTP/1.1 connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.open = True

    @property
    def usable(self) -> bool:
        return self.open and not self._reader.at_eof()

    async def ask(self, request: bytes) -> tuple[int, str | None]:
        """Send a request; return the status and Retry-After. The answer's body is read and discarded."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        await self._reader.readexactly(int(headers["content-length"]))
        self.open = headers.get("connection", "").lower() != "close"
        return int(head[0].split()[1]), headers.get("retry-after")

    def close(self) -> None:
        self.open = False
        self._writer.close()


class Crowd:
    """Sends the plan's requests and records every answer, or that there was none."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._chance = plan, random.Random(plan.seed)
        self._requests = [_request(plan, task) for task in plan.tasks or ("",)]
        self._idle: list[Connection] = []
        self._opening = asyncio.Semaphore(OPENING)
        self.opened = 0
        self.answers: list[Answer] = []
        self._start = 0.0

    async def run(self) -> None:
        self._start = time.perf_counter()
        await (self._open_loop() if self._plan.rate else self._closed_loop())
        for connection in self._idle:
            connection.close()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _open_loop(self) -> None:
        plan, chance, due = self._plan, self._chance, 0.0
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.requests or sys.maxsize):
                due += chance.expovariate(plan.rate)
                if plan.seconds and due >= plan.seconds:
                    return
                await asyncio.sleep(max(0.0, due - self._now()))
                group.create_task(self._ask(due))

    async def _closed_loop(self) -> None:
        plan = self._plan
        left = iter(range(plan.requests or sys.maxsize))

        async def client() -> None:
            for _ in left:
                if plan.seconds and self._now() >= plan.seconds:
                    return
                await self._ask(self._now())

        async with asyncio.TaskGroup() as group:
            for _ in range(plan.clients):
                group.create_task(client())

    async def _ask(self, due_s: float) -> None:
        task = self._drawn()
        status, retry_after, sent_s, connection = NO_ANSWER, None, self._now(), None
        try:
            async with asyncio.timeout(ANSWER_S):
                connection = await self._connection()
                status, retry_after = await connection.ask(self._requests[task])
        except (OSError, EOFError, TimeoutError):  # an IncompleteReadError is an EOFError
            if connection is not None:
                connection.close()
        if connection is not None and connection.open:
            self._idle.append(connection)
        self.answers.append(Answer(due_s, sent_s, self._now(), status, retry_after, task))

    def _drawn(self) -> int:
        """The task of the next request."""
        if len(self._requests) == 1:
            return 0
        return self._chance.choices(range(len(self._requests)), self._plan.shares or None)[0]

    async def _connection(self) -> Connection:
        """The most recently used connection, because the server may be about to close those that were idle for
        longer."""
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
            connection.close()
        async with self._opening:
            opened = Connection(*await asyncio.open_connection(self._plan.host, self._plan.port))
        self.opened += 1
        return opened


def _request(plan: Plan, task: str) -> bytes:
    body = Path(plan.picture.replace("{task}", task)).read_bytes()
    head = (
        f"POST {plan.path.replace('{task}', task)} HTTP/1.1\r\nHost: {plan.host}:{plan.port}\r\n"
        f"Content-Type: {plan.content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    crowd = Crowd(Plan(**json.load(sys.stdin)))
    before = time.process_time()  # excludes the start of Python
    asyncio.run(crowd.run())
    result = LoadResult(crowd.answers, round(time.process_time() - before, 3), crowd.opened)
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
