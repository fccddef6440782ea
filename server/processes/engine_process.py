"""An engine's own process: everything of a server but HTTP, behind an RPC server."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from server.app.engine_runtime import EngineRuntime, build_engine_runtime
from server.app.stores import close_all, open_authenticator
from server.batching.watchdog import EXIT_CODE
from server.engine import attention_maps
from server.observability import metrics
from server.observability.multiprocess import ProcessMetrics
from server.rpc.engine_server import EngineBackend, EngineServer
from server.settings import Settings

from .engine_socket import COUNTS, LOOK, socket_path

KEYS_S: Final = 2.0  # between two looks at the tenants' weights


class EngineProcess:
    """Everything but HTTP, on the device of a `number`. `folder` is where the desk listens and the ledger lies."""

    def __init__(self, settings: Settings, folder: Path, ledger: ProcessMetrics, number: int = 0) -> None:
        self.settings, self._ledger = settings, ledger
        self._ring = open_authenticator(settings)
        self.room = build_engine_runtime(settings, self._ring, number)
        self._desk = EngineServer(socket_path(folder, number), _desk_room(self.room, ledger))
        self._leaving = asyncio.Event()

    async def run(self, ready: Any) -> int:
        """Until a signal comes or the engine is lost; `ready` is called with the facts in JSON. The exit status."""
        room, grace_s = self.room, self.settings.drain_timeout_s
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._leaving.set)
        room.watchdog.on_lost = self._leaving.set
        await room.warm_up()
        await self._desk.start()
        room.start()
        others = [asyncio.create_task(work) for work in (self._ledger.write_periodically(), self._keep_weights())]
        ready(room.facts.as_json())
        await self._leaving.wait()
        await room.drain(0.0 if room.lost else grace_s)
        await self._desk.stop()
        for task in others:
            task.cancel()
        await room.stop()
        await close_all(room.store, self._ring)
        self._ledger.write_snapshot()
        return EXIT_CODE if room.lost else 0

    async def _keep_weights(self) -> None:
        """Tenants' shares are their keys', which nobody here asks for otherwise."""
        while True:
            await self._ring.refresh()
            await asyncio.sleep(KEYS_S)


def _desk_room(room: EngineRuntime, ledger: ProcessMetrics) -> EngineBackend:
    def facts() -> dict[str, Any]:
        return {
            "waiting": len(room.batcher),
            "places": room.batcher.places,
            "retry_after_s": room.batcher.retry_after_s(),
            "trouble": room.batcher.trouble or room.watchdog.trouble,
            "tasks": metrics.TASKS.tasks(),
        }

    def residents() -> dict[str, Any]:
        return {f"{one.seat.task}@{one.seat.version}": [one.bytes, one.pinned] for one in room.residency.occupants()}

    return EngineBackend(
        batcher=room.batcher,
        residency=room.residency,
        size=room.facts.spec.image_size,
        exclusive_works={LOOK: partial(_look, room)},
        facts=facts,
        residents=residents,
        revision=lambda: room.residency.revision,
        views={"rack": partial(_rack, room), COUNTS: partial(_written, ledger)},
    )


async def _written(ledger: ProcessMetrics) -> None:
    ledger.write_snapshot()


async def _rack(room: EngineRuntime) -> Any:
    return (await room.occupied()).model_dump(mode="json")


def _look(room: EngineRuntime, pixels: Any, seat: Any) -> Any:
    """In the engine's thread."""
    seen = attention_maps.look(room.engine, pixels, seat)
    return {
        name: {**asdict(one), "grid": one.grid.tolist()}
        for name, one in (("last", seen.last), ("rollout", seen.rollout))
    }
