"""The resize and crop of a picture: as the server does it, or uncropped, for a random crop in each epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from server.engine.images.decode import Geometry, fit, whole

Pixels = NDArray[np.uint8]

_FORMAT: Final = "cut-1"  # to be changed with the pixels of a cut: it is part of the keys of pixel and feature caches


@dataclass(frozen=True)
class Cut:
    """Pixels uint8 [S, S, 3] as the server cuts them. With `uncropped` the whole picture at 8/7 of the size (the FGVC
    recipe resizes to 256 and crops 224): uint8 [h, w, 3], no side shorter than S. A geometry that squashes or adds
    borders does so in both cases."""

    geometry: Geometry
    uncropped: bool = False

    def __call__(self, image: Image.Image) -> Pixels:
        if not self.uncropped:
            return fit(image, self.geometry)
        if self.geometry.crop_mode == "center":
            return whole(image, self.side, self.geometry.interpolation)
        return fit(image, replace(self.geometry, size=self.side, crop_pct=1.0))

    @property
    def side(self) -> int:
        """Length of the shorter side in pixels; uncropped 256 for 224, 512 for 448, 438 for 384."""
        return self.geometry.size * 8 // 7 if self.uncropped else self.geometry.size

    @cached_property
    def name(self) -> str:
        """Equal for cuts that give the same pixels; the version of Pillow is included, since decoders differ in the
        last bit."""
        return f"{_FORMAT} Pillow-{PIL.__version__} {self.geometry} uncropped={self.uncropped}"

    @property
    def typical_bytes(self) -> int:
        """Bytes of one picture: exact for the server's cut; uncropped those of a 4:3 photograph."""
        return self.side * self.side * 3 * 4 // (3 if self.uncropped else 4)


def crop_at(pixels: Pixels, size: int, down: float, right: float) -> Pixels:
    """The size × size square at the relative position `down` and `right`, both in [0, 1): uniform values make every
    position equally likely. pixels: uint8 [h, w, 3]."""
    top, left = (_offset(share, side - size) for share, side in zip((down, right), pixels.shape, strict=False))
    return pixels[top : top + size, left : left + size]


def _offset(share: float, most: int) -> int:
    return min(most, math.floor(share * (most + 1)))
