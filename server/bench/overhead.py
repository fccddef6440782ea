"""`python -m server bench overhead`: CPU time of a request when the model costs nothing.

Our server with an engine that answers at once, beside a LitServe app whose model gives back what it gets, if `--peer`
names a Python that has LitServe. Each is a process tree of its own on loopback; clients ask it in a closed loop, in
turns, round after round. What is told is the trees' CPU time by request, medians of the rounds, and its ratio to the
peer's. The peer gets the smallest request there is, a number as JSON; ours a picture, as pixels and as a PNG to decode.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from server.samples import draw

from .own_server import own_server
from .plain_client import PlainClient
from .process_tree import cpu_s

TASK = "fruit"
START_S = 120.0
LITSERVE = """
import sys
import litserve

class Identity(litserve.LitAPI):
    def setup(self, device):
        pass

    def decode_request(self, request):
        return request["input"]

    def predict(self, batch):
        return batch

    def encode_response(self, output):
        return {"output": output}

if __name__ == "__main__":
    api = Identity(max_batch_size=int(sys.argv[2]), batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False)
"""


@dataclass(frozen=True)
class Asked:
    """What is asked of whom. `pid`: of the process whose tree is charged."""

    name: str
    url: str
    body: bytes
    content_type: str
    pid: int


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with ExitStack() as stack:
        asked = [*stack.enter_context(_ours())]
        if options.peer is not None:
            asked.append(stack.enter_context(_litserve(options.peer, options.clients)))
        figures = asyncio.run(_measure(asked, options))
    report = {"clients": options.clients, "requests": options.requests, "cpu_ms": figures}
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(prog="python -m server bench overhead", description=about)
    parser.add_argument("--peer", type=Path, help="a Python that has LitServe")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


def table(report: dict[str, Any]) -> str:
    """Markdown; the ratio is to the last row, the peer where there is one."""
    last = [*report["cpu_ms"].values()][-1]
    lines = [f"| {report['clients']} clients | CPU ms a request | ratio |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {ms:.2f} | {ms / last:.2f} |" for name, ms in report["cpu_ms"].items()])


async def _measure(asked: Sequence[Asked], options: argparse.Namespace) -> dict[str, float]:
    spent: dict[str, list[float]] = {one.name: [] for one in asked}
    for turn in range(options.rounds + 1):  # the first pays for set-up
        for one in asked:
            before = cpu_s(one.pid)
            await _ask(one, options.clients, options.requests)
            if turn:
                spent[one.name].append((cpu_s(one.pid) - before) / options.requests * 1e3)
    return {name: round(statistics.median(found), 3) for name, found in spent.items()}


async def _ask(one: Asked, clients: int, requests: int) -> None:
    left = iter(range(requests))
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=clients)) as http:

        async def client() -> None:
            for _ in left:
                answer = await http.post(one.url, content=one.body, headers={"Content-Type": one.content_type})
                answer.raise_for_status()

        await asyncio.gather(*(client() for _ in range(clients)))


@contextmanager
def _ours() -> Iterator[list[Asked]]:
    """With one task, fitted before: its worker has nothing to do afterwards."""
    with own_server("server.bench.noop_server") as (url, home, pid), closing(PlainClient(url)) as client:
        draw(home / "pictures")
        dataset = client.upload(home / "pictures" / TASK / "train")
        client.ended(client.train(TASK, dataset, "linear", {"epochs": 1}))
        size = client.get("/readyz")["backbone"]["image_size"]
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        yield [
            Asked("lensrack, pixels", f"{url}/predict/{TASK}", _npy(pixels), "application/x-npy", pid),
            Asked("lensrack, PNG", f"{url}/predict/{TASK}", _png(pixels), "image/png", pid),
        ]


def _npy(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, pixels)
    return out.getvalue()


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@contextmanager
def _litserve(python: Path, batch: int) -> Iterator[Asked]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="lensrack-bench-") as folder:
        script = Path(folder) / "identity.py"
        script.write_text(LITSERVE)
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen([python, script, str(port), str(batch)], stdout=log, stderr=log, cwd=folder)
        asked = Asked("LitServe, a number", f"http://127.0.0.1:{port}/predict", b'{"input": 4.0}', "application/json",
                      process.pid)  # fmt: skip
        try:
            _wait_for(asked, process)
            yield asked
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(asked: Asked, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.post(asked.url, content=asked.body, headers={"Content-Type": asked.content_type}).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("LitServe did not start: has that Python it installed?")


if __name__ == "__main__":
    main()
