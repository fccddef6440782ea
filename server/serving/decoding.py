"""The images of one request on their way to pixels, in threads: from files, from pixels, or ready already."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from server.batching.row import Row
from server.engine.images import decode
from server.engine.images.decode import Geometry
from server.errors import Conflict, ServiceError, Unprocessable

Pixels = npt.NDArray[np.uint8]
Fitted = Pixels | npt.NDArray[np.float32]  # uint8 [S, S, 3], or float32 [3, S, S] that came normalised


@dataclass(frozen=True, eq=False)
class PrecutImage:
    """An image that came as pixels, uint8 [S, S, 3], and how it was cut, where its sender says so."""

    pixels: Pixels
    geometry: Geometry | None = None

    def fitted(self, geometry: Geometry) -> Pixels:
        """The pixels, where they are what `geometry` asks for. Raises Conflict (geometry_differs), Unprocessable."""
        expected = (geometry.size, geometry.size, 3)
        if self.geometry is None and self.pixels.shape != expected:
            raise Unprocessable(
                f"expected pixels of the version's size, {list(expected)}, got {list(self.pixels.shape)}",
                code="bad_pixels",
            )
        if self.geometry not in (None, geometry) or self.pixels.shape != expected:
            raise Conflict(
                f"expected pixels cut as the version's: {geometry}; got {list(self.pixels.shape)}: {self.geometry}",
                code="geometry_differs",
                geometry=asdict(geometry),
            )
        return self.pixels


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image that came as pixels of any size, uint8 [H, W, 3], to be cut as an encoded one would be."""

    pixels: Pixels


@dataclass(frozen=True, eq=False)
class Normalised:
    """An image as the network takes it, float32 [3, S, S], cut and normalised by whoever sent it."""

    values: npt.NDArray[np.float32]


Image = bytes | PrecutImage | Decoded | Normalised  # an encoded file, or what a client has made of it


class ImageBatch:
    """A request's images, decoded and cut once for each geometry that its tasks ask for.

    Decoding and cutting are one step of one thread, so that at most as many full-size images are in memory as there
    are decoding threads.
    """

    def __init__(self, given: Sequence[Image], pool: Executor, max_pixels: int, margin: float = math.inf) -> None:
        """margin: see `images.pixels`."""
        self._given, self._pool, self._max_pixels, self._margin = given, pool, max_pixels, margin
        self._fitted: dict[Geometry, asyncio.Future[list[Fitted]]] = {}
        self._shown: list[list[Row]] = [[] for _ in given]
        self._cut = all(isinstance(image, PrecutImage) for image in given)
        self.decode_s = 0.0

    async def fitted(self, geometry: Geometry) -> list[Fitted]:
        """uint8 [S, S, 3] per image; the same arrays for everybody who asks for this geometry."""
        if self._cut:  # nothing is to be computed: a thread would cost more than the look at their shape
            return [self._fit_one(i, geometry) for i in range(len(self._given))]
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
        """Nobody waits any more: what is not decoded yet need not be, and rows that know each other, so that none of
        them goes before the garbage is collected, forget each other and with them the pixels."""
        for companions in self._shown:
            companions.clear()
        for fitting in self._fitted.values():
            if not fitting.done():
                fitting.cancel()
            elif not fitting.cancelled():
                fitting.exception()  # those who asked have been told

    async def _fit(self, geometry: Geometry) -> list[Fitted]:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._pool, self._fit_one, i, geometry) for i in range(len(self._given))]
        try:
            return list(await asyncio.gather(*jobs))
        finally:
            for job in jobs:  # one bad image is enough: the others need not be decoded
                job.cancel()
            self.decode_s = max(self.decode_s, time.perf_counter() - started)

    def _fit_one(self, index: int, geometry: Geometry) -> Fitted:
        image = self._given[index]
        try:
            return fitted(image, geometry, self._max_pixels, self._margin)
        except ServiceError as error:
            if len(self._given) > 1:
                error.detail = f"image {index}: {error.detail}"
                error.args = (error.detail,)
                error.extra["image"] = index
            raise


def fitted(image: Image, geometry: Geometry, max_pixels: int, margin: float = math.inf) -> Fitted:
    """What the engine takes of it. Errors: as `images`, and of pixels that are cut another way."""
    if isinstance(image, PrecutImage):
        return image.fitted(geometry)
    if isinstance(image, Decoded):
        return decode.of_picture(image.pixels, geometry, max_pixels=max_pixels)
    if isinstance(image, Normalised):
        return decode.of_tensor(image.values, geometry)
    return decode.pixels(image, geometry, max_pixels=max_pixels, margin=margin)
