"""Augmentation of the training pictures, drawn per epoch from the recipe's seed.

none   as the server cuts them (the VTAB recipe of the VPT paper)
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
    """One augmented view of each of n pictures. `corner`: [n, 2] in [0, 1), the crop's relative position down and
    right; None where pictures are cut as by the server. `mirrored`: bool [n]."""

    corner: NDArray[np.float64] | None
    mirrored: NDArray[np.bool_]

    def take(self, index: NDArray[np.int64]) -> Views:
        return Views(None if self.corner is None else self.corner[index], self.mirrored[index])

    def applied(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The views of pictures [n, S, S, 3] that are cut already, which leaves only the mirroring. Raises ValueError
        for views with crops."""
        if self.corner is not None:
            raise ValueError("augmentation 'crop' needs whole pictures; these are cut already: use 'none' or 'flip'")
        return np.where(self.mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)


def draw(how: Augment, count: int, generator: torch.Generator) -> Views | None:
    """The views of `count` pictures for one epoch; None without augmentation."""
    if how == "none":
        return None
    drawn = torch.rand(count, 3, generator=generator, dtype=torch.float64).numpy()
    return Views(drawn[:, :2] if how == "crop" else None, drawn[:, 2] < 0.5)
