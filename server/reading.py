"""From a stored dataset to the pictures of a fit, and of a judgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from server.datasets.dataset import Dataset, Example
from server.datasets.dataset_store import DatasetStore
from server.engine.images import Geometry
from server.training.data import Pictures, Source, Splits, hold_out, read_pictures
from server.training.judge import Batch, Batches
from server.training.recipe import Recipe

BATCH = 64
Check = Callable[[], None]  # called after each picture and before each batch: what it raises ends the reading


class Reader:
    """Reads pictures for a backbone that sees them as `geometry` says."""

    def __init__(self, datasets: DatasetStore, geometry: Geometry, max_pixels: int) -> None:
        self._datasets, self._geometry, self._max_pixels = datasets, geometry, max_pixels

    def splits(self, dataset: Dataset, recipe: Recipe, check: Check) -> Splits:
        """The dataset's own splits; without one for validation, a share of the training pictures."""
        return self._cut(dataset, recipe, self._geometry, check)

    def validation(self, dataset: Dataset, recipe: Recipe, splits: Splits, check: Check) -> Batches:
        """The validation pictures again, cut as whoever is judged asks."""

        def batches(geometry: Geometry) -> Iterator[Batch]:
            same = geometry == self._geometry
            val = (splits if same else self._cut(dataset, recipe, geometry, check)).val
            for index in np.array_split(np.arange(len(val)), -(-len(val) // BATCH)):
                check()
                part = val.take(index)
                yield part.images.read(np.arange(len(part))), [dataset.labels[target] for target in part.targets]

        return batches

    def _cut(self, dataset: Dataset, recipe: Recipe, geometry: Geometry, check: Check) -> Splits:
        train, val, test = (
            self._pictures(dataset, [e for e in dataset.examples if e.split == split], geometry, check)
            for split in ("train", "val", "test")
        )
        if not len(val):
            train, val = hold_out(train, recipe.validation, recipe.seed)
        return Splits(train, val, test if len(test) else None)

    def _pictures(self, dataset: Dataset, examples: Sequence[Example], geometry: Geometry, check: Check) -> Pictures:
        targets = {label: index for index, label in enumerate(dataset.labels)}
        sources = [
            Source(lambda sha256=example.sha256: self._datasets.read(sha256), targets[example.label])  # type: ignore[misc]
            for example in examples
        ]
        return read_pictures(sources, geometry, max_pixels=self._max_pixels, on_picture=check)
