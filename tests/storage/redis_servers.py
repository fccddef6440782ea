"""Redis servers that are set up in ways that tests need, each on a free port."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.conftest import free_port

CLUSTER_PORTS_UP_TO = 55_535  # a server in a cluster also listens on a port 10,000 above its own


@contextmanager
def redis_with(folder: Path, *lines: str, password: str | None = None) -> Iterator[str]:
    """A redis-server with these lines in its configuration, once it answers; its URL, without password and database."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.fail("redis-server is not installed: apt-get install redis-server")
    port = next(port for port in iter(free_port, None) if port <= CLUSTER_PORTS_UP_TO)
    folder.mkdir(exist_ok=True)
    text = "\n".join((f"port {port}", "bind 127.0.0.1", 'save ""', *lines, ""))
    process = subprocess.Popen([binary, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=folder)
    assert process.stdin is not None
    process.stdin.write(text.encode())
    process.stdin.close()
    deadline = time.monotonic() + 20
    try:
        with redis.Redis(port=port, password=password) as client:
            while True:
                try:
                    client.ping()
                    break
                except (redis.exceptions.ConnectionError, redis.exceptions.ResponseError) as error:
                    if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.ResponseError):
                        break
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()  # one that cannot save would not end
        process.wait(10)
