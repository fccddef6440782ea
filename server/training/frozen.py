"""What the frozen backbone says of pictures before anything is trained: computed once, whoever fits on them.

The pooled feature, where only a head is trained; the tokens that enter layer l, where the first prompts come there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.engine import normalise
from server.engine.lens import Plain

from .ahead import ahead
from .data import Images, Index, Pixels
from .feature_cache import FeatureKey, Features, NoCache, to_array, to_tensor
from .together import Ask, Fitting

EVAL_BATCH = 64
MOST_BYTES = 2**30  # of the tokens of one set of pictures: beyond it the first layers run every time


class FrozenFeatures:
    """Remembers the features of every `Images` that it has been asked about; `cache` remembers them for later ones."""

    def __init__(self, backbone: Backbone, cache: Features | None = None) -> None:
        self._backbone, self._cache = backbone, cache or NoCache()
        own = backbone.spec.preprocess
        self._mean = torch.tensor([own.mean], device=backbone.device)
        self._std = torch.tensor([own.std], device=backbone.device)
        self._known: list[tuple[Images, int, Tensor]] = []

    def fits(self, images: int, layer: int) -> bool:
        """Whether what enters `layer` is worth keeping for so many pictures."""
        spec = self._backbone.spec
        return layer == spec.depth or images * spec.tokens * spec.dim * self._backbone.dtype.itemsize <= MOST_BYTES

    def of(self, images: Images, layer: int, tick: Callable[[], None]) -> Fitting[Tensor]:
        """Tokens [n, N, D] that enter block `layer` of the plain backbone; pooled features [n, D] where `layer` is the
        number of blocks. In the backbone's dtype, pooled ones on its device; `tick` is called after a batch."""
        for seen, its_layer, features in self._known:
            if seen is images and its_layer == layer:
                return features
        key = self._key(images, layer)
        kept = None if key is None else self._cache.get(key)
        if kept is None:
            features = yield from self._computed(images, layer, tick)
            if key is not None:
                self._cache.put(key, to_array(features))
        else:
            features = to_tensor(kept)
            features = features.to(self._backbone.device) if layer == self._backbone.spec.depth else features
        self._known.append((images, layer, features))
        return features

    def _computed(self, images: Images, layer: int, tick: Callable[[], None]) -> Fitting[Tensor]:
        found, pooled = [], layer == self._backbone.spec.depth
        with closing(in_order(images)) as batches:
            for pixels in batches:
                answer = yield Ask(self.embedded(pixels), Plain(), until=None if pooled else layer)
                found.append(answer if pooled else answer.cpu())
                tick()
        return torch.cat(found).clone()

    def _key(self, images: Images, layer: int) -> FeatureKey | None:
        backbone, spec = self._backbone, self._backbone.spec
        if images.digest is None:
            return None
        own = spec.preprocess
        dtype = str(backbone.dtype).removeprefix("torch.") + (" packed" if backbone.packed else "")
        what = "pooled" if layer == spec.depth else f"tokens {layer}"
        return FeatureKey(images.digest, spec.fingerprint, backbone.device.type, dtype, own.mean, own.std, what)

    @torch.no_grad()
    def embedded(self, pixels: Pixels) -> Tensor:
        """uint8 [B, S, S, 3] → the tokens that enter the first block [B, N, D], with the backbone's normalisation."""
        stack = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._backbone.device)
        return vit.embed(self._backbone, normalise(stack, self._mean, self._std, self._backbone.dtype))


def in_order(images: Images) -> Generator[Pixels, None, None]:
    """All pictures in their order, `EVAL_BATCH` at a time."""
    return ahead(images, parts(len(images)), None)


def parts(count: int) -> Sequence[Index]:
    return [np.arange(start, min(start + EVAL_BATCH, count)) for start in range(0, count, EVAL_BATCH)]
