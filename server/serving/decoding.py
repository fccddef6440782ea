"""Preprocessing: the images of one request become the network's inputs, in threads.

bytes (an encoded file) ─▶ decode ─┐
DecodedImage, any size ────────────┴▶ resize and crop to a geometry ─┐
PrecutImage, cut by the client ─────▶ checked ───────────────────────┼─▶ ModelInput
NormalisedImage, float32 ───────────▶ checked ───────────────────────┘
"""

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
ModelInput = Pixels | npt.NDArray[np.float32]  # uint8 [S, S, 3], or float32 [3, S, S] that came normalised


@dataclass(frozen=True, eq=False)
class PrecutImage:
    """Pixels that the client has resized and cropped, uint8 [S, S, 3]; `geometry` says how, where it is declared."""

    pixels: Pixels
    geometry: Geometry | None = None

    def require(self, geometry: Geometry) -> Pixels:
        """Return the pixels, cut as `geometry` says. Raises Conflict (geometry_differs), Unprocessable (bad_pixels)."""
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
class DecodedImage:
    """Pixels of any size, uint8 [H, W, 3], to be resized and cropped like an encoded image."""

    pixels: Pixels


@dataclass(frozen=True, eq=False)
class NormalisedImage:
    """The network's input, float32 [3, S, S], resized, cropped and normalised by the client."""

    values: npt.NDArray[np.float32]


Image = bytes | PrecutImage | DecodedImage | NormalisedImage  # bytes: an encoded file


class ImageBatch:
    """A request's images, decoded and cut once for each geometry that its tasks need.

    Decoding and cutting are one step of one thread, so that at most as many full-size images are in memory as there
    are decoding threads.
    """

    def __init__(self, images: Sequence[Image], pool: Executor, max_pixels: int, margin: float = math.inf) -> None:
        """margin: see `images.pixels`."""
        self._images, self._pool, self._max_pixels, self._margin = images, pool, max_pixels, margin
        self._by_geometry: dict[Geometry, asyncio.Future[list[ModelInput]]] = {}
        self._rows: list[list[Row]] = [[] for _ in images]  # of each image, over all tasks
        self._precut = all(isinstance(image, PrecutImage) for image in images)
        self.decode_s = 0.0

    async def inputs(self, geometry: Geometry) -> list[ModelInput]:
        """Return uint8 [S, S, 3] for each image; the same arrays for all tasks of this geometry."""
        if self._precut:  # there is nothing to compute: a thread would cost more than the look at the shapes
            return [self._input(i, geometry) for i in range(len(self._images))]
        if geometry not in self._by_geometry:
            self._by_geometry[geometry] = asyncio.ensure_future(self._decode(geometry))
        # a task that times out must not cancel the decoding that others wait for
        return await asyncio.shield(self._by_geometry[geometry])

    def link(self, rows: Sequence[Row]) -> None:
        """Make rows of the same image companions of each other, across tasks."""
        for row, companions in zip(rows, self._rows, strict=True):
            companions.append(row)
            row.companions = companions

    def close(self) -> None:
        """Cancel decoding that is not done, and unlink the rows: in their cycle of references the pixels would live
        until the next garbage collection."""
        for companions in self._rows:
            companions.clear()
        for decoding in self._by_geometry.values():
            if not decoding.done():
                decoding.cancel()
            elif not decoding.cancelled():
                decoding.exception()  # the tasks that waited have raised it

    async def _decode(self, geometry: Geometry) -> list[ModelInput]:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._pool, self._input, i, geometry) for i in range(len(self._images))]
        try:
            return list(await asyncio.gather(*jobs))
        finally:
            for job in jobs:  # one bad image fails the request: the others need not be decoded
                job.cancel()
            self.decode_s = max(self.decode_s, time.perf_counter() - started)

    def _input(self, index: int, geometry: Geometry) -> ModelInput:
        image = self._images[index]
        try:
            return model_input(image, geometry, self._max_pixels, self._margin)
        except ServiceError as error:
            if len(self._images) > 1:
                error.detail = f"image {index}: {error.detail}"
                error.args = (error.detail,)
                error.extra["image"] = index
            raise


def model_input(image: Image, geometry: Geometry, max_pixels: int, margin: float = math.inf) -> ModelInput:
    """Return an image as the network takes it. Raises like `engine.images.decode`, and like `PrecutImage.require`."""
    if isinstance(image, PrecutImage):
        return image.require(geometry)
    if isinstance(image, DecodedImage):
        return decode.of_picture(image.pixels, geometry, max_pixels=max_pixels)
    if isinstance(image, NormalisedImage):
        return decode.of_tensor(image.values, geometry)
    return decode.pixels(image, geometry, max_pixels=max_pixels, margin=margin)
