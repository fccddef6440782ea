"""Outputs of the frozen backbone, computed once and shared by all fits on the same pictures.

Pooled features, where only a head is trained; the tokens that enter layer l, where layer l is the first with prompts;
for readers the keys and values of every layer that they read, of as many pictures as `MOST_READ_BYTES` allows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from prompts_store import Preprocess
from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.batch import normalise
from server.engine.lens import Plain
from server.engine.reader import Recorded, hidden_tokens
from server.engine.spec import Pool, Spec

from .caches.feature_cache import FeatureKey, Features, to_array, to_tensor
from .co_batching import Fitting, ForwardRequest
from .data import Images, Index, Pixels
from .prefetch import prefetch

EVAL_BATCH = 64
MOST_BYTES = 2**30  # of the tokens of one set of pictures: beyond it the first layers run in every epoch
MOST_READ_BYTES = 2**30  # of the keys and values of one set of pictures: for the rest the trunk runs in every epoch
READ_SETS = 2  # sets of pictures whose keys and values are kept: training and validation


class FrozenFeatures:
    """Keeps the features of every `Images` object; `cache` keeps them for later jobs. `preprocess`: the normalisation,
    by default that of the backbone's pretraining."""

    def __init__(self, backbone: Backbone, cache: Features | None = None, preprocess: Preprocess | None = None) -> None:
        self._backbone, self._cache = backbone, cache
        self._preprocess = how = preprocess or backbone.spec.preprocess
        self._mean = torch.tensor([how.mean], device=backbone.device)
        self._std = torch.tensor([how.std], device=backbone.device)
        self._known: list[tuple[Images, str, Tensor]] = []
        self._recorded: deque[tuple[Images, int, Recorded]] = deque(maxlen=READ_SETS)

    @property
    def spec(self) -> Spec:
        return self._backbone.spec

    def fits(self, images: int, layer: int) -> bool:
        """Whether the features of so many pictures fit in memory: pooled ones always do."""
        spec = self._backbone.spec
        return layer == spec.depth or images * spec.tokens * spec.dim * self._backbone.dtype.itemsize <= MOST_BYTES

    def features(
        self, images: Images, layer: int, tick: Callable[[], None], pool: Pool | None = None
    ) -> Fitting[Tensor]:
        """Tokens [n, N, D] that enter block `layer` of the plain backbone; where `layer` is the number of blocks,
        features [n, D], pooled by `pool`. In the backbone's dtype; pooled ones on its device. `tick` is called after
        every batch."""
        what = self._what(layer, pool)
        for known_images, known_what, features in self._known:
            if known_images is images and known_what == what:
                return features
        features = yield from self._cached(images, layer, tick, pool)
        self._known.append((images, what, features))
        return features

    def _cached(self, images: Images, layer: int, tick: Callable[[], None], pool: Pool | None) -> Fitting[Tensor]:
        """The features from the cache, or computed and put there."""
        key = self._key(images, self._what(layer, pool))
        if self._cache is None or key is None:
            return (yield from self._computed(images, layer, tick, pool))
        if (array := self._cache.get(key)) is not None:
            features = to_tensor(array)
            return features.to(self._backbone.device) if layer == self._backbone.spec.depth else features
        features = yield from self._computed(images, layer, tick, pool)
        self._cache.put(key, to_array(features))
        return features

    def recordable(self, images: int, start: int) -> int:
        """How many of so many pictures `recorded` keeps for readers that start at `start`. Sizes are those of the
        backbone's dtype, so that recorded and fresh pictures give readers the same numbers."""
        spec = self._backbone.spec
        numbers = 2 * (spec.depth - start) * (spec.tokens - hidden_tokens(spec)) * spec.dim
        return min(images, MOST_READ_BYTES // (numbers * self._backbone.dtype.itemsize))

    def recorded(self, images: Images, start: int, tick: Callable[[], None]) -> Fitting[Recorded]:
        """The keys and values of the first `recordable` pictures for readers that start at `start`, on the device.
        Computed in the pictures' order, so that a resumed fit reads the same bits. The last `READ_SETS` are kept."""
        for known_images, known_start, recorded in self._recorded:
            if known_images is images and known_start == start:
                return recorded
        batches = []
        with closing(prefetch(images, parts(self.recordable(len(images), start)), None)) as pixels:
            for batch in pixels:
                batches.append((yield ForwardRequest(self.embedded(batch), Plain(), read_from=start)))
                tick()
        recorded = joined(start, batches)
        self._recorded.append((images, start, recorded))
        return recorded

    def _computed(self, images: Images, layer: int, tick: Callable[[], None], pool: Pool | None) -> Fitting[Tensor]:
        features, pooled = [], layer == self._backbone.spec.depth
        with closing(in_order(images)) as batches:
            for pixels in batches:
                answer = yield ForwardRequest(self.embedded(pixels), Plain(pool), until=None if pooled else layer)
                features.append(answer if pooled else answer.cpu())
                tick()
        return torch.cat(features).clone()

    def _what(self, layer: int, pool: Pool | None) -> str:
        """The name of the place in the network, for `FeatureKey.what`."""
        if layer < self._backbone.spec.depth:
            return f"tokens {layer}"
        return "pooled" if pool is None else f"pooled {pool}"

    def _key(self, images: Images, what: str) -> FeatureKey | None:
        backbone, spec = self._backbone, self._backbone.spec
        if images.digest is None:
            return None
        how = self._preprocess
        dtype = backbone.precision + (" packed" if backbone.packed else "")
        return FeatureKey(images.digest, spec.fingerprint, backbone.device.type, dtype, how.mean, how.std, what)

    @torch.no_grad()
    def embedded(self, pixels: Pixels) -> Tensor:
        """uint8 [B, S, S, 3] → the tokens [B, N, D] that enter the first block, with this object's normalisation."""
        return vit.embed(self._backbone, self._normalised(pixels))

    @torch.no_grad()
    def patches(self, pixels: Pixels) -> Tensor:
        """uint8 [B, S, S, 3] → patch embeddings [B, patches, D], without position embeddings."""
        return vit.patches(self._backbone, self._normalised(pixels))

    def _normalised(self, pixels: Pixels) -> Tensor:
        stack = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._backbone.device)
        return normalise(stack, self._mean, self._std, self._backbone.dtype)


def joined(start: int, batches: list[Recorded]) -> Recorded:
    """The batches concatenated, layer by layer, so that at most one layer is in memory twice. Empties `batches`."""
    layers = range(len(batches[0].keys))
    first = torch.cat([batch.first for batch in batches])
    keys, values = [list(batch.keys) for batch in batches], [list(batch.values) for batch in batches]
    batches.clear()
    all_keys, all_values = ([torch.cat([batch.pop(0) for batch in part]) for _ in layers] for part in (keys, values))
    return Recorded(start, first, all_keys, all_values)


def in_order(images: Images) -> Generator[Pixels, None, None]:
    """The pixels of all pictures in order, `EVAL_BATCH` at a time, prefetched."""
    return prefetch(images, parts(len(images)), None)


def parts(count: int) -> Sequence[Index]:
    """The numbers below `count` in order, `EVAL_BATCH` at a time."""
    return [np.arange(start, min(start + EVAL_BATCH, count)) for start in range(0, count, EVAL_BATCH)]
