"""What tests with doomed workers share: the processes that they are forked from, and pictures to train on."""

from __future__ import annotations

import tarfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from server.cli.sample_pictures import draw
from tests.e2e.doomed_worker import forge


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return forge()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder, per_class=6)
    with tarfile.open(folder / "fruit.tar", "w") as packed:
        packed.add(folder / "fruit" / "train", arcname=".")
    return folder / "fruit.tar"
