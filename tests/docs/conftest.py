"""One server for the pages of a file: the bundled backbone with its ready tasks, as `make serve` starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server_process import ServerProcess, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("docs"), backbone="bundled") as running:
        yield running
