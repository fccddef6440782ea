"""What the jobs of a worker share."""

from __future__ import annotations

from dataclasses import dataclass

from prompts_store import Preprocess
from server.datasets.dataset_store import DatasetStore
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training.caches.feature_cache import Features
from server.training.frozen import FrozenFeatures

from .checkpoints import Checkpoints
from .dataset_reader import DatasetReader


@dataclass(frozen=True)
class Resources:
    """The backbone, the methods, the data sets and their pictures, the cached features and the checkpoints."""

    backbone: Backbone
    registry: Registry
    datasets: DatasetStore
    reader: DatasetReader
    features: Features | None
    checkpoints: Checkpoints

    def frozen_features(self, preprocess: Preprocess | None = None) -> FrozenFeatures:
        """Fresh in-memory features over the shared cache; `preprocess` as for `FrozenFeatures`."""
        return FrozenFeatures(self.backbone, self.features, preprocess)
