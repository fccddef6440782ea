"""A backbone's description without its weights: architecture, geometry, pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from prompts_store import Preprocess, manifest

from .images.decode import Geometry

TaskPool = manifest.Pool
Pool = TaskPool | Literal["attention", "reader"]
TASK_POOLS: Final[tuple[TaskPool, ...]] = get_args(TaskPool)  # poolings that a task can choose


@dataclass(frozen=True)
class Spec:
    """What layers above the engine need to know of a backbone without touching a tensor.

    `tokens` counts every token of an image's sequence. The first `prefix_tokens` of them (class token, registers) are
    not patches, and `cls` pooling reads the first `class_tokens` of these: 2 with a distillation token, 0 without a
    class token. `pool` is the pooling that the backbone was trained with.
    """

    arch: str
    fingerprint: str
    trained: bool
    depth: int
    dim: int
    heads: int
    hidden: int  # width of the MLP's hidden layer
    image_size: int
    patch_size: int  # pixels of a patch's side; with a convolutional stem, of the square that a token stands for
    tokens: int
    prefix_tokens: int
    class_tokens: int
    pool: Pool
    preprocess: Preprocess

    @property
    def geometry(self) -> Geometry:
        """The default geometry of images for this backbone; a bundle may bring another."""
        preprocess = self.preprocess
        return Geometry.of(
            preprocess.size, preprocess.interpolation, preprocess.crop_pct, preprocess.crop_mode, preprocess.mean
        )
