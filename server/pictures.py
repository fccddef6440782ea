"""The images of one request on their way from bytes to pixels, in threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from server.batching.row import Row
from server.engine import images
from server.engine.images import Geometry
from server.errors import ServiceError

Pixels = npt.NDArray[np.uint8]


class Pictures:
    """A request's images, decoded and cut once for each geometry that its tasks ask for.

    Decoding and cutting are one step of one thread, so that at most as many full-size images are in memory as there
    are decoding threads.
    """

    def __init__(self, files: Sequence[bytes], pool: Executor, max_pixels: int) -> None:
        self._files, self._pool, self._max_pixels = files, pool, max_pixels
        self._fitted: dict[Geometry, asyncio.Future[list[Pixels]]] = {}
        self._shown: list[list[Row]] = [[] for _ in files]
        self.decode_s = 0.0

    async def fitted(self, geometry: Geometry) -> list[Pixels]:
        """uint8 [S, S, 3] per image; the same arrays for everybody who asks for this geometry."""
        if geometry not in self._fitted:
            self._fitted[geometry] = asyncio.ensure_future(self._fit(geometry))
        # a task whose time is up leaves the others their pixels
        return await asyncio.shield(self._fitted[geometry])

    def show(self, rows: Sequence[Row]) -> None:
        """Let rows of the same image know each other across tasks."""
        for row, companions in zip(rows, self._shown, strict=True):
            companions.append(row)
            row.companions = companions

    def close(self) -> None:
        """Nobody waits any more: what is not decoded yet need not be."""
        for fitting in self._fitted.values():
            if not fitting.done():
                fitting.cancel()
            elif not fitting.cancelled():
                fitting.exception()  # those who asked have been told

    async def _fit(self, geometry: Geometry) -> list[Pixels]:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._pool, self._fit_one, i, geometry) for i in range(len(self._files))]
        try:
            return list(await asyncio.gather(*jobs))
        finally:
            for job in jobs:  # one bad image is enough: the others need not be decoded
                job.cancel()
            self.decode_s = max(self.decode_s, time.perf_counter() - started)

    def _fit_one(self, index: int, geometry: Geometry) -> Pixels:
        try:
            return images.pixels(self._files[index], geometry, max_pixels=self._max_pixels)
        except ServiceError as error:
            if len(self._files) > 1:
                error.detail = f"image {index}: {error.detail}"
                error.args = (error.detail,)
                error.extra["image"] = index
            raise
