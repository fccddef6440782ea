"""Stores of each kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prompts_store import (
    Store,
)
from tests.prompts_store.stores import Backend, opener, urls


@pytest.fixture(params=["memory", "file", "redis", "cached-memory"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    kind = request.param.removeprefix("cached-")
    backend = Backend(opener(kind, request), cached=request.param != kind)
    yield backend
    backend.close()


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.open()


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """A store that several processes share."""
    return urls(request.param, request)
