"""The serving floor of `serving`, with its engine behind a unix socket: what a front end has instead of its own."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.rpc.connection import EngineConnection
from server.rpc.engine_client import RemoteBatcher, RemoteCall, RemoteResidency
from server.rpc.engine_pool import BalancedBatcher, BalancedResidency, EnginePool, RemoteEngine
from server.rpc.engine_server import EngineBackend, EngineServer
from server.rpc.shared_memory import PixelWriter
from server.serving.answers import Limits
from server.serving.predictor import Predictor
from tests.serving.floor import FINGERPRINT, GEOMETRY, SIZE, Floor

LOOK = RemoteCall("look", lambda told: told)


@dataclass(eq=False)
class Front:
    """A front end: its line, its pair, and a predictor over it."""

    connection: EngineConnection
    slots: PixelWriter
    batcher: RemoteBatcher
    residency: RemoteResidency
    predictor: Predictor


def backend(floor: Floor) -> EngineBackend:
    def residents() -> dict[str, Any]:
        return {
            f"{seat.task}@{version}": [1024, version in floor.shelf.held] for version, seat in floor.shelf.seats.items()
        }

    def facts() -> dict[str, Any]:
        batcher = floor.batcher
        told = {"waiting": len(batcher), "places": batcher.places, "retry_after_s": 1.0}
        return {**told, "trouble": batcher.trouble}

    async def rack() -> Any:
        return {"slots": 8}

    return EngineBackend(
        batcher=floor.batcher,
        residency=floor.shelf,
        size=SIZE,
        exclusive_works={"look": lambda pixels, seat: [int(pixels[0, 0, 0]), seat.slot]},
        facts=facts,
        residents=residents,
        revision=lambda: hash((frozenset(floor.shelf.seats), frozenset(floor.shelf.held))),
        views={"rack": rack},
    )


@asynccontextmanager
async def server(floor: Floor) -> AsyncIterator[tuple[EngineServer, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine"
        opened = EngineServer(path, backend(floor))
        await opened.start()
        try:
            yield opened, path
        finally:
            await opened.stop()
            await asyncio.sleep(0)  # what was cut off is heard of


@dataclass(eq=False)
class SeveralFront:
    """A front end before several engines."""

    engines: EnginePool
    residency: BalancedResidency
    batcher: BalancedBatcher
    predictor: Predictor


def predictor(floor: Floor, residency: Any, batcher: Any) -> Predictor:
    return Predictor(
        floor.store,
        residency,
        batcher,
        floor.pool,
        limits=Limits(max_images=16, max_image_pixels=10_000, max_tasks=20),
        geometry=GEOMETRY,
        fingerprint=FINGERPRINT,
    )


def far_engine(floor: Floor, path: Path, *, number: int = 0, slots: int = 128) -> RemoteEngine:
    shared = PixelWriter(slots, SIZE)
    connection = EngineConnection(path, shared)
    batcher = RemoteBatcher(connection, shared, max_batch=floor.max_batch, max_queue=floor.max_queue)
    return RemoteEngine(number, "cpu", connection, RemoteResidency(connection, number), batcher)


@asynccontextmanager
async def several(floors: Sequence[Floor], paths: Sequence[Path]) -> AsyncIterator[SeveralFront]:
    """Floors over one store, each behind its desk."""
    far = [far_engine(*one, number=number) for number, one in enumerate(zip(floors, paths, strict=True))]
    engines = EnginePool(far, max_batch=floors[0].max_batch)
    residency, batcher = BalancedResidency(engines), BalancedBatcher(engines)
    for one in far:
        one.connection.start()
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(one.connection.connected() for one in far))
        yield SeveralFront(engines, residency, batcher, predictor(floors[0], residency, batcher))
        await settled(lambda: not any(one.batcher.sent or one.seats for one in far))
        batcher.check_integrity()
    finally:
        for one in far:
            await one.connection.stop()
            one.connection._writer.close()


@asynccontextmanager
async def front(floor: Floor, path: Path, *, slots: int = 128) -> AsyncIterator[Front]:
    shared = PixelWriter(slots, SIZE)
    connection = EngineConnection(path, shared)
    batcher = RemoteBatcher(connection, shared, max_batch=floor.max_batch, max_queue=floor.max_queue)
    residency = RemoteResidency(connection)
    connection.start()
    try:
        async with asyncio.timeout(60):
            await connection.connected()
        yield Front(connection, shared, batcher, residency, predictor(floor, residency, batcher))
        batcher.check_integrity()
    finally:
        await connection.stop()
        shared.close()


@asynccontextmanager
async def far(floor: Floor) -> AsyncIterator[Front]:
    """The floor's own predictor is the front's as long as this lasts."""
    async with server(floor) as (_, path), front(floor, path) as built:
        near, floor.predictor = floor.predictor, built.predictor
        try:
            yield built
            await settled(lambda: floor.shelf.in_use == 0 and not built.slots.used)
        finally:
            floor.engine.gate.set()
            floor.predictor = near


@asynccontextmanager
async def spread(floor: Floor) -> AsyncIterator[SeveralFront]:
    """As `far`, with the pair that several engines have, over this one."""
    async with server(floor) as (_, path), several([floor], [path]) as built:
        near, floor.predictor = floor.predictor, built.predictor
        try:
            yield built
            await settled(lambda: floor.shelf.in_use == 0)
        finally:
            floor.engine.gate.set()
            floor.predictor = near


async def settled(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
