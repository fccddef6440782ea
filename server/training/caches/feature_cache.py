"""Frozen features, computed once for a set of pictures: what the backbone says of them before anything is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .array_cache import ArrayCache
from .array_file import Array


@dataclass(frozen=True)
class FeatureKey:
    """Everything that features depend on: `images` is `Images.digest`, `backbone` its fingerprint, `device` (`cpu`,
    `cuda`) and `dtype` what computes them and in what, packed weights told from plain ones, which round otherwise;
    `mean` and `std` the normalisation; `what` names the place in the network that they are taken from."""

    images: str
    backbone: str
    device: str
    dtype: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    what: str = "pooled"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Features(Protocol):
    """Arrays of any shape, float32, float16, or bfloat16 as its bits in uint16."""

    def get(self, key: FeatureKey) -> Array | None: ...

    def put(self, key: FeatureKey, array: Array) -> None: ...


class FeatureCache:
    """On disk, bounded in bytes, for threads and processes. A large array comes back mapped: its memory is the kernel's
    to take back, and writing to it changes neither the file nor what others get."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._arrays = ArrayCache(folder, max_bytes, spread=False)

    def get(self, key: FeatureKey) -> Array | None:
        return self._arrays.get(key.digest)

    def put(self, key: FeatureKey, array: Array) -> None:
        self._arrays.put(key.digest, array)


class NoCache:
    """Keeps nothing."""

    def get(self, key: FeatureKey) -> Array | None:
        return None

    def put(self, key: FeatureKey, array: Array) -> None:
        pass


def to_array(features: Tensor) -> Array:
    """For a cache: numpy knows no bfloat16, its bits travel as uint16."""
    kept = features.detach().cpu().contiguous()
    return kept.view(torch.int16).numpy().view(np.uint16) if kept.dtype == torch.bfloat16 else kept.numpy()


def to_tensor(kept: Array) -> Tensor:
    """Back again, on the CPU."""
    return (
        torch.from_numpy(kept.view(np.int16)).view(torch.bfloat16)
        if kept.dtype == np.uint16
        else torch.from_numpy(kept)
    )
