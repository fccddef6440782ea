"""The types of one batch: the engine's inputs and its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .residency import Seat

Pixels = NDArray[np.uint8] | NDArray[np.float32]  # uint8 [S, S, 3], or float32 [3, S, S], already normalised
Logits = NDArray[np.float64]  # [C]
Work = tuple[Pixels, Seat]  # a row as callers pass it
ImageInput = tuple[Pixels, Sequence[float], Sequence[float]]  # an image, the mean and the std that normalise it
ImageSeat = tuple[int, Seat]  # a row: the number of its image, the seat of the lens that answers it


def normalise(pixels: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 [B, S, S, 3] with mean and std [B, 3], in units of full scale → [B, 3, S, S]. Computed in float32
    at least."""
    wide = torch.promote_types(dtype, torch.float32)
    # channels first and in place from the first step on: the same numbers in a tenth of the time
    x = pixels.permute(0, 3, 1, 2).to(wide, memory_format=torch.contiguous_format)
    return x.div_(255).sub_(mean.to(wide)[:, :, None, None]).div_(std.to(wide)[:, :, None, None]).to(dtype)
