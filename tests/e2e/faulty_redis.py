"""A redis-server that is killed and started again on the same port, or has a replica that takes its place; and a road
to it that is slow, goes nowhere, or tells of every piece that passes."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import free_port


class RedisProcess:
    """`durable`: with an append-only file that is synced at every write. `replica_of`: the port of its master."""

    def __init__(self, folder: Path, *, durable: bool, replica_of: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self._folder, self.durable, self._master = free_port(), folder, durable, replica_of
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail("redis-server is not installed: apt-get install redis-server")
        kept = ("yes", "--appendfsync", "always") if self.durable else ("no",)
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        copied = ("--replicaof", "127.0.0.1", str(self._master)) if self._master else ()
        self._process = subprocess.Popen([*command, "--appendonly", *kept, *copied], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
                return
            except redis.exceptions.RedisError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True)

    def in_step_with(self, master: RedisProcess) -> bool:
        """Whether this replica has everything that its master has."""
        with self.client() as own, master.client() as other:
            mine, its = own.info("replication"), other.info("replication")
        up = mine.get("master_link_status") == "up"
        return bool(up and mine["slave_repl_offset"] == its["master_repl_offset"])

    def promote(self) -> None:
        """From now on it is a master, as a failover makes it."""
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


class Road:
    """A TCP road to `port`: each piece takes `delay_s`; while it is `broken`, nothing comes through or is said.

    `to` may change: who comes later is led elsewhere, as by an address that moves. `on_piece` is called for each piece
    before it is passed on, in either direction.
    """

    def __init__(self, port: int) -> None:
        self.to, self.port = port, 0
        self.delay_s, self.broken = 0.0, False
        self.on_piece: Callable[[], None] = lambda: None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="road", daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._run(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError), closing(writer):
            there, back = await asyncio.open_connection("127.0.0.1", self.to)
            with closing(back):
                await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError), closing(sink):
            while piece := await source.read(65536):
                await asyncio.sleep(self.delay_s)
                await self._mended()
                self.on_piece()
                sink.write(piece)
                await sink.drain()

    async def _mended(self) -> None:
        while self.broken:  # noqa: ASYNC110  # it is set from another thread
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self.broken = False
        self._loop.call_soon_threadsafe(self._server.close)
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        own = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
