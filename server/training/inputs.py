"""What a fit's batches are cut from."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.reader import Recorded

from . import augment
from .co_batching import RecordedRows
from .data import Index, LabelledImages, Pixels
from .prefetch import ahead


@dataclass(frozen=True)
class Inputs:
    """What a batch is cut from: pictures, or what the frozen layers before `layer` make of them."""

    pictures: LabelledImages
    features: Tensor | None  # [n, N, D] that enter block `layer`, or pooled [n, D] behind the last
    layer: int
    targets: Tensor  # [n]
    recorded: Recorded | None = None  # what readers read of the first pictures; they start at `layer`

    @property
    def pooled(self) -> bool:
        return self.features is not None and self.features.ndim == 2

    def read(
        self, batches: Sequence[Index], views: augment.Views | None = None
    ) -> Generator[Pixels | None, None, None]:
        """The pixels of each batch, read ahead; None for each where features stand for them."""
        if self.features is not None or (self.recorded is not None and len(self.recorded) == len(self.targets)):
            yield from (None for _ in batches)
        else:
            unread = batches if self.recorded is None else [index[index >= len(self.recorded)] for index in batches]
            with closing(ahead(self.pictures.images, unread, views)) as pixels:
                yield from pixels

    def kept(self, index: Tensor) -> RecordedRows | None:
        """What readers read of those pictures of a batch that it is known of."""
        if self.recorded is None:
            return None
        known = index < len(self.recorded)
        rows = self.recorded.take(index[known])
        if bool(known.all()):
            return RecordedRows(rows, None)
        order = torch.cat((known.nonzero()[:, 0], (~known).nonzero()[:, 0])).argsort()
        return RecordedRows(rows, order.to(self.recorded.first.device))
