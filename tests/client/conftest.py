"""A client of each kind for a rack in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lensrack import AsyncClient, Client
from tests.client.scripted_rack import Rack, serve, transport
from tests.client.ways import IN_PROCESS, Blocking, Make


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
