"""The inputs of a fit, from which its batches are taken."""

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
from .prefetch import prefetch


@dataclass(frozen=True)
class Inputs:
    """Pictures, or the output of the frozen layers before `layer` for them."""

    pictures: LabelledImages
    features: Tensor | None  # tokens [n, N, D] that enter block `layer`, or pooled features [n, D] after the last block
    layer: int
    targets: Tensor  # [n]
    recorded: Recorded | None = None  # of the first pictures: keys and values for readers that start at `layer`

    @property
    def pooled(self) -> bool:
        return self.features is not None and self.features.ndim == 2

    def read(
        self, batches: Sequence[Index], views: augment.Views | None = None
    ) -> Generator[Pixels | None, None, None]:
        """The pixels of each batch, prefetched; None for a batch whose features or recordings are known."""
        if self.features is not None or (self.recorded is not None and len(self.recorded) == len(self.targets)):
            yield from (None for _ in batches)
        else:
            unread = batches if self.recorded is None else [index[index >= len(self.recorded)] for index in batches]
            with closing(prefetch(self.pictures.images, unread, views)) as pixels:
                yield from pixels

    def recorded_rows(self, index: Tensor) -> RecordedRows | None:
        """The recorded rows of a batch; None where nothing is recorded."""
        if self.recorded is None:
            return None
        known = index < len(self.recorded)
        rows = self.recorded.take(index[known])
        if bool(known.all()):
            return RecordedRows(rows, None)
        order = torch.cat((known.nonzero()[:, 0], (~known).nonzero()[:, 0])).argsort()
        return RecordedRows(rows, order.to(self.recorded.first.device))
