"""How much of a picture is kept, and at what size: as the server sees it, or whole, for a crop that is drawn later."""

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

_FORMAT: Final = "cut-1"  # a change of what a cut gives must change it: caches of pixels and features go by the name


@dataclass(frozen=True)
class Cut:
    """uint8 [S, S, 3] as the server cuts it; with `uncropped` all of it at 8/7 of the size (the FGVC recipe resizes to
    256 and crops 224): uint8 [h, w, 3], no side shorter than S. A geometry that squashes or borders does so too."""

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
        """Pixels of the shorter side: 256 for 224, 512 for 448, 438 for 384."""
        return self.geometry.size * 8 // 7 if self.uncropped else self.geometry.size

    @cached_property
    def name(self) -> str:
        """Equal for equal pixels of one picture; decoders differ in the last bit from version to version."""
        return f"{_FORMAT} Pillow-{PIL.__version__} {self.geometry} uncropped={self.uncropped}"

    @property
    def typical_bytes(self) -> int:
        """Of one picture: exact for what the server sees; uncropped, a photograph of 4:3."""
        return self.side * self.side * 3 * 4 // (3 if self.uncropped else 4)


def crop_at(pixels: Pixels, size: int, down: float, right: float) -> Pixels:
    """The size × size square whose corner lies `down` and `right`, both in [0, 1), in the room that there is: every
    place is equally likely when they are uniform. pixels: uint8 [h, w, 3]."""
    top, left = (_place(share, side - size) for share, side in zip((down, right), pixels.shape, strict=False))
    return pixels[top : top + size, left : left + size]


def _place(share: float, room: int) -> int:
    return min(room, math.floor(share * (room + 1)))
