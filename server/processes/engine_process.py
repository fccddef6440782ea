"""An engine's process: all of a server but HTTP, behind an RPC server for the front ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
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

KEYS_S: Final = 2.0  # between two reads of the tenants' weights


class EngineProcess:
    """The engine of a `number`, from 0. Its socket and its metrics are in `folder`, which all processes share."""

    def __init__(self, settings: Settings, folder: Path, process_metrics: ProcessMetrics, number: int = 0) -> None:
        self._settings, self._metrics = settings, process_metrics
        self._authenticator = open_authenticator(settings)
        self._runtime = build_engine_runtime(settings, self._authenticator, number)
        self._server = EngineServer(socket_path(folder, number), _backend(self._runtime, process_metrics))
        self._stop = asyncio.Event()

    async def run(self, send_ready: Callable[[str], None]) -> int:
        """Serve until SIGTERM, or until the engine is lost, and return the exit status.

        `send_ready` is called with the backbone's facts as JSON when front ends can connect.
        """
        runtime = self._runtime
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        runtime.watchdog.on_lost = self._stop.set
        await runtime.warm_up()
        await self._server.start()
        runtime.start()
        tasks = [asyncio.create_task(work) for work in (self._metrics.write_periodically(), self._keep_weights())]
        send_ready(runtime.backbone.as_json())
        await self._stop.wait()
        await self._end(tasks)
        return EXIT_CODE if runtime.lost else 0

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        runtime = self._runtime
        await runtime.drain(0.0 if runtime.lost else self._settings.drain_timeout_s)
        await self._server.stop()
        for task in tasks:
            task.cancel()
        await runtime.stop()
        await close_all(runtime.store, self._authenticator)
        self._metrics.write_snapshot()

    async def _keep_weights(self) -> None:
        """Keep the tenants' weights fresh: no request is authenticated here, so nothing else reads the keys."""
        while True:
            await self._authenticator.refresh()
            await asyncio.sleep(KEYS_S)


def _backend(runtime: EngineRuntime, process_metrics: ProcessMetrics) -> EngineBackend:
    def facts() -> dict[str, Any]:
        return {
            "waiting": len(runtime.batcher),
            "places": runtime.batcher.places,
            "retry_after_s": runtime.batcher.retry_after_s(),
            "trouble": runtime.batcher.trouble or runtime.watchdog.trouble,
            "tasks": metrics.TASKS.tasks(),
        }

    def residents() -> dict[str, Any]:
        return {f"{o.seat.task}@{o.seat.version}": [o.bytes, o.pinned] for o in runtime.residency.occupants()}

    return EngineBackend(
        batcher=runtime.batcher,
        residency=runtime.residency,
        size=runtime.backbone.spec.image_size,
        exclusive_works={LOOK: partial(_attention_maps, runtime)},
        facts=facts,
        residents=residents,
        revision=lambda: runtime.residency.revision,
        views={"rack": partial(_rack, runtime), COUNTS: partial(_write_metrics, process_metrics)},
    )


async def _write_metrics(process_metrics: ProcessMetrics) -> None:
    process_metrics.write_snapshot()


async def _rack(runtime: EngineRuntime) -> Any:
    return (await runtime.occupied()).model_dump(mode="json")


def _attention_maps(runtime: EngineRuntime, pixels: Any, seat: Any) -> Any:
    """Return the attention maps of an image as JSON. Runs in the engine's thread."""
    maps = attention_maps.look(runtime.engine, pixels, seat)
    return {
        name: {**asdict(one), "grid": one.grid.tolist()}
        for name, one in (("last", maps.last), ("rollout", maps.rollout))
    }
