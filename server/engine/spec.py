"""What is known of a backbone without its weights: architecture, geometry, pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from prompts_store import Preprocess, manifest

from .images.decode import Geometry

Chosen = manifest.Pool
Pool = Chosen | Literal["attention", "reader"]
CHOSEN: Final[tuple[Chosen, ...]] = get_args(Chosen)  # what a task can ask for


@dataclass(frozen=True)
class Spec:
    """What the floors above need to know of a backbone without touching a tensor.

    `tokens` counts every token of an image's sequence; `prefix_tokens` of them (class, registers) are no patches, and
    the first `class_tokens` of these are what `cls` pooling reads: 2 with a distillation token, 0 without any.
    `pool` is the pooling that the backbone was made with.
    """

    arch: str
    fingerprint: str
    trained: bool
    depth: int
    dim: int
    heads: int
    hidden: int  # width of the MLP's hidden layer
    image_size: int
    patch_size: int  # pixels of a patch's side; behind a convolutional stem those that a token stands for
    tokens: int
    prefix_tokens: int
    class_tokens: int
    pool: Pool
    preprocess: Preprocess

    @property
    def geometry(self) -> Geometry:
        """How pictures are cut for this backbone, where no bundle says otherwise."""
        own = self.preprocess
        return Geometry.of(own.size, own.interpolation, own.crop_pct, own.crop_mode, own.mean)
