"""Augmentation: how each training picture is looked at in one epoch. Drawn from the recipe's seed, like everything.

none   as the server sees it (the VTAB recipe of the VPT paper)
flip   mirrored half of the time
crop   resized to 8/7 of the size, a random square of it, mirrored half of the time (the FGVC recipe, appendix A)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Augment = Literal["none", "flip", "crop"]


@dataclass(frozen=True)
class Views:
    """One look at each of n pictures. `corner`: [n, 2] in [0, 1), how far down and right the crop's corner lies in the
    room that there is; None where the server's own cut is kept. `mirrored`: bool [n]."""

    corner: NDArray[np.float64] | None
    mirrored: NDArray[np.bool_]

    def take(self, index: NDArray[np.int64]) -> Views:
        return Views(None if self.corner is None else self.corner[index], self.mirrored[index])

    def applied(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The views of pictures [n, S, S, 3] that are cut already: only mirroring is left to do. Raises ValueError for
        views that cut for themselves."""
        if self.corner is not None:
            raise ValueError("augmentation 'crop' needs whole pictures; these are cut already: use 'none' or 'flip'")
        return np.where(self.mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)


def draw(how: Augment, count: int, generator: torch.Generator) -> Views | None:
    """The views of `count` pictures for one epoch."""
    if how == "none":
        return None
    drawn = torch.rand(count, 3, generator=generator, dtype=torch.float64).numpy()
    return Views(drawn[:, :2] if how == "crop" else None, drawn[:, 2] < 0.5)
