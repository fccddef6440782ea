"""A scripted rack, and what is pointed at it: clients of each kind, and the command line."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lensrack import AsyncClient, Client
from lensrack.cli import main
from tests.client.command_line import SCRIPT, Done, Run
from tests.client.scripted_rack import Rack, serve, transport
from tests.client.ways import IN_PROCESS, PIXELS, Blocking, Make


@pytest.fixture
def rack() -> Rack:
    return Rack()


@pytest.fixture(params=IN_PROCESS)
def make(request: pytest.FixtureRequest, rack: Rack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a client of one kind over one way; everything is closed at the end."""
    monkeypatch.delenv("LENSRACK_URL", raising=False)
    monkeypatch.delenv("LENSRACK_API_KEY", raising=False)
    kind, way = request.param.split("-")
    with ExitStack() as stack:
        where: dict[str, Any] = {"base_url": "http://rack"} if way == "transport" else {}
        if way == "socket":
            where["base_url"] = stack.enter_context(serve(rack))
        runner = stack.enter_context(asyncio.Runner()) if kind == "async" else None

        def build(**options: Any) -> Any:
            if way == "transport":
                options["transport"] = transport(rack)
            if runner is None:
                return stack.enter_context(Client(**{**where, **options}))
            client = Blocking(AsyncClient(**{**where, **options}), runner)
            stack.callback(client.close)
            return client

        yield build


@pytest.fixture
def url(rack: Rack) -> Iterator[str]:
    with serve(rack) as url:
        yield url


@pytest.fixture
def environment(url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LENSRACK_")}
    return {**kept, "LENSRACK_URL": url, "COLUMNS": "200"}


@pytest.fixture
def run(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """The command line in this process, with an environment of its own: a process for each would take a second."""

    def run(*arguments: object, code: int = 0, **options: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as outside:
            outside.chdir(tmp_path)
            outside.setattr(os, "environ", {**environment, **options})
            outside.setattr(sys, "argv", ["lensrack", *map(str, arguments)])
            try:
                main()
                left = 0
            except SystemExit as leaving:
                left = leaving.code or 0
        done = Done(*capsys.readouterr())
        assert left == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def script(environment: dict[str, str], tmp_path: Path) -> Run:
    """The real console script, in a process of its own."""

    def script(*arguments: object, code: int = 0, **options: str) -> Done:
        done = subprocess.run(
            [SCRIPT, *map(str, arguments)],
            capture_output=True,
            check=False,
            text=True,
            env={**environment, **options},
            cwd=tmp_path,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return Done(done.stdout, done.stderr)

    return script


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bottle.jpg"
    path.write_bytes(PIXELS)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bottles" / "glass").mkdir(parents=True)
    (tmp_path / "bottles" / "glass" / "0.jpg").write_bytes(PIXELS)
    return tmp_path / "bottles"
