"""A cache of frozen features: the plain backbone's outputs for a set of pictures."""

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
    """Everything that features depend on. `images`: `Images.digest`. `backbone`: its fingerprint. `device`: `cpu` or
    `cuda`. `dtype`: of the computation, with a note on packed weights, which round differently. `mean`, `std`: the
    normalisation. `what`: the place in the network."""

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
    """Arrays of any shape in float32 or float16, or bfloat16 as its bits in uint16."""

    def get(self, key: FeatureKey) -> Array | None: ...

    def put(self, key: FeatureKey, array: Array) -> None: ...


class FeatureCache:
    """Features on disk, bounded in bytes, for threads and processes. Large arrays are mapped copy-on-write: the kernel
    can reclaim their memory, and writing to them changes neither the file nor other readers' arrays."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._arrays = ArrayCache(folder, max_bytes, spread=False)

    def get(self, key: FeatureKey) -> Array | None:
        return self._arrays.get(key.digest)

    def put(self, key: FeatureKey, array: Array) -> None:
        self._arrays.put(key.digest, array)


def to_array(features: Tensor) -> Array:
    """Features as an array for the cache: numpy has no bfloat16, so its bits become uint16."""
    kept = features.detach().cpu().contiguous()
    return kept.view(torch.int16).numpy().view(np.uint16) if kept.dtype == torch.bfloat16 else kept.numpy()


def to_tensor(kept: Array) -> Tensor:
    """The features of a cached array, on the CPU."""
    return (
        torch.from_numpy(kept.view(np.int16)).view(torch.bfloat16)
        if kept.dtype == np.uint16
        else torch.from_numpy(kept)
    )
