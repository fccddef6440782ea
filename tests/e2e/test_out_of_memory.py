"""Memory that is really short: a forward of many rows does not fit, parts of it do, and every row is answered."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from server.batching.batcher import Batcher
from server.batching.row import Row
from server.engine import backbone as backbones
from server.engine.engine import Engine
from server.engine.rack import Rack
from tests.e2e.doomed_worker import forge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
ROWS = 512
MIB = 2**20


def engine() -> Engine:
    backbone = backbones.load("untrained", device="cpu")
    return Engine(backbone, Rack(dim=backbone.spec.dim, slots=1, vectors=1))


def pictures(size: int) -> list[np.ndarray]:
    return [np.full((size, size, 3), number % 251, np.uint8) for number in range(ROWS)]


async def answered(backbone: Engine, shown: list[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """All rows in one batch; the answers, and how many rows each forward was asked for."""
    sizes: list[int] = []
    embed = backbone.embed

    def counted(images):
        sizes.append(len(images))
        return embed(images)

    backbone.embed = counted  # type: ignore[method-assign]
    batcher = Batcher(backbone, max_batch=ROWS, max_queue=ROWS)
    now, loop = batcher.clock(), asyncio.get_running_loop()
    rows = [Row("", "", None, image, now + 1e6, now, loop.create_future()) for image in shown]
    batcher.submit(rows)
    found = await asyncio.gather(*(row.reply for row in rows))
    await batcher.drain(10)
    return list(found), sizes


def in_little_memory(folder: str) -> None:
    """In a process of its own: what is free is enough for some hundred rows and not for five hundred."""
    torch.set_num_threads(1)
    backbone = engine()
    shown = pictures(backbone.backbone.spec.image_size)
    expected = np.concatenate([backbone.embed(shown[at : at + 64]) for at in range(0, ROWS, 64)])
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = size + 200 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    found, sizes = asyncio.run(answered(backbone, shown))
    told = {"sizes": sizes, "difference": float(np.abs(np.stack(found) - expected).max())}
    Path(folder, "told.json").write_text(json.dumps(told))
    os._exit(0)


def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits(tmp_path: Path) -> None:
    process = forge().Process(target=in_little_memory, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["sizes"][:2] == [ROWS, ROWS // 2], "what failed is halved"
    assert min(told["sizes"]) >= 32, "and no further than it must be"
    assert told["difference"] < 1e-5
