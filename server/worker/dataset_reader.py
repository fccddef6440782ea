"""From a stored dataset to the pictures of a fit and of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from server.datasets.dataset import Dataset
from server.engine.images.decode import Geometry
from server.training.data import LabelledImages, Splits, hold_out
from server.training.evaluate import Batch, Batches
from server.training.recipe import Recipe
from server.training.stored_images import Decoder, StoredImages

BATCH = 64
Check = Callable[[], None]  # called before each batch; what it raises ends the reading


class DatasetReader:
    """Reads datasets. The pictures are decoded by `decoder`, on demand."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def splits(self, dataset: Dataset, recipe: Recipe, geometry: Geometry | None = None) -> Splits:
        """The dataset's splits, cut in `geometry`, by default the decoder's. For a dataset without a validation split,
        a share of the training pictures."""
        return _split(dataset, recipe, self._with(geometry or self._decoder.geometry))

    def validation(self, dataset: Dataset, recipe: Recipe, check: Check) -> Batches:
        """The validation pictures in batches, cut in the geometry of the bundle under evaluation."""

        def batches(geometry: Geometry) -> Iterator[Batch]:
            val = _split(dataset, recipe, self._with(geometry)).val
            for index in np.array_split(np.arange(len(val)), -(-len(val) // BATCH)):
                check()
                yield val.images.read(index), [dataset.labels[target] for target in val.targets[index]]

        return batches

    def _with(self, geometry: Geometry) -> Decoder:
        return replace(self._decoder, geometry=geometry)


def _split(dataset: Dataset, recipe: Recipe, decoder: Decoder) -> Splits:
    number = {label: index for index, label in enumerate(dataset.labels)}
    pictures = LabelledImages(
        StoredImages.of([example.sha256 for example in dataset.examples], decoder),
        np.array([number[example.label] for example in dataset.examples], np.int64),
    )
    splits = np.array([example.split for example in dataset.examples])
    train, val, test = (pictures.take(np.flatnonzero(splits == split)) for split in ("train", "val", "test"))
    if not len(val):
        train, val = hold_out(train, recipe.validation, recipe.seed)
    return Splits(train, val, test if len(test) else None)
