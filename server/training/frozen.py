"""What the frozen backbone says of pictures before anything is trained: computed once, whoever fits on them.

The pooled feature, where only a head is trained; the tokens that enter layer l, where the first prompts come there; for
readers the keys and values of every layer that they read, of as many pictures as memory is given for (`read`).
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

from .caches.feature_cache import FeatureKey, Features, NoCache, to_array, to_tensor
from .co_batching import Fitting, ForwardRequest
from .data import Images, Index, Pixels
from .prefetch import ahead

EVAL_BATCH = 64
MOST_BYTES = 2**30  # of the tokens of one set of pictures: beyond it the first layers run every time
MOST_READ_BYTES = 2**30  # of the keys and values of one set of pictures: the trunk runs every time for the others
READ_SETS = 2  # of pictures whose keys and values are kept: those to learn from and those to be judged on


class FrozenFeatures:
    """Remembers the features of every `Images` that it has been asked about; `cache` remembers them for later ones.
    `seen`: how pictures are normalised, where not as the backbone was pretrained."""

    def __init__(self, backbone: Backbone, cache: Features | None = None, seen: Preprocess | None = None) -> None:
        self._backbone, self._cache = backbone, cache or NoCache()
        self._own = own = seen or backbone.spec.preprocess
        self._mean = torch.tensor([own.mean], device=backbone.device)
        self._std = torch.tensor([own.std], device=backbone.device)
        self._known: list[tuple[Images, str, Tensor]] = []
        self._read: deque[tuple[Images, int, Recorded]] = deque(maxlen=READ_SETS)

    @property
    def spec(self) -> Spec:
        return self._backbone.spec

    def fits(self, images: int, layer: int) -> bool:
        """Whether what enters `layer` is worth keeping for so many pictures."""
        spec = self._backbone.spec
        return layer == spec.depth or images * spec.tokens * spec.dim * self._backbone.dtype.itemsize <= MOST_BYTES

    def of(self, images: Images, layer: int, tick: Callable[[], None], pool: Pool | None = None) -> Fitting[Tensor]:
        """Tokens [n, N, D] that enter block `layer` of the plain backbone; features [n, D], pooled as `pool` says,
        where `layer` is the number of blocks. In the backbone's dtype, pooled ones on its device; `tick` is called
        after a batch."""
        what = self._what(layer, pool)
        for seen, its_what, features in self._known:
            if seen is images and its_what == what:
                return features
        key = self._key(images, what)
        kept = None if key is None else self._cache.get(key)
        if kept is None:
            features = yield from self._computed(images, layer, tick, pool)
            if key is not None:
                self._cache.put(key, to_array(features))
        else:
            features = to_tensor(kept)
            features = features.to(self._backbone.device) if layer == self._backbone.spec.depth else features
        self._known.append((images, what, features))
        return features

    def readable(self, images: int, start: int) -> int:
        """Of how many of so many pictures `read` keeps what readers that start at `start` read. In the backbone's
        dtype, so that a picture that is kept and one that is not are read alike."""
        spec = self._backbone.spec
        numbers = 2 * (spec.depth - start) * (spec.tokens - hidden_tokens(spec)) * spec.dim
        return min(images, MOST_READ_BYTES // (numbers * self._backbone.dtype.itemsize))

    def read(self, images: Images, start: int, tick: Callable[[], None]) -> Fitting[Recorded]:
        """What readers that start at `start` read of the first `readable` pictures, on the device. Computed in their
        order, so that a fit that is resumed reads the same bits; the last few sets are remembered."""
        for seen, its_start, found in self._read:
            if seen is images and its_start == start:
                return found
        batches = []
        with closing(ahead(images, parts(self.readable(len(images), start)), None)) as pixels:
            for own in pixels:
                batches.append((yield ForwardRequest(self.embedded(own), Plain(), read_from=start)))
                tick()
        found = joined(start, batches)
        self._read.append((images, start, found))
        return found

    def _computed(self, images: Images, layer: int, tick: Callable[[], None], pool: Pool | None) -> Fitting[Tensor]:
        found, pooled = [], layer == self._backbone.spec.depth
        with closing(in_order(images)) as batches:
            for pixels in batches:
                answer = yield ForwardRequest(self.embedded(pixels), Plain(pool), until=None if pooled else layer)
                found.append(answer if pooled else answer.cpu())
                tick()
        return torch.cat(found).clone()

    def _what(self, layer: int, pool: Pool | None) -> str:
        """The place in the network."""
        if layer < self._backbone.spec.depth:
            return f"tokens {layer}"
        return "pooled" if pool is None else f"pooled {pool}"

    def _key(self, images: Images, what: str) -> FeatureKey | None:
        backbone, spec = self._backbone, self._backbone.spec
        if images.digest is None:
            return None
        own = self._own
        dtype = backbone.precision + (" packed" if backbone.packed else "")
        return FeatureKey(images.digest, spec.fingerprint, backbone.device.type, dtype, own.mean, own.std, what)

    @torch.no_grad()
    def embedded(self, pixels: Pixels) -> Tensor:
        """uint8 [B, S, S, 3] → the tokens that enter the first block [B, N, D], with the fit's normalisation."""
        return vit.embed(self._backbone, self._normalised(pixels))

    @torch.no_grad()
    def patches(self, pixels: Pixels) -> Tensor:
        """uint8 [B, S, S, 3] → patch embeddings [B, patches, D], which know nothing of their position."""
        return vit.patches(self._backbone, self._normalised(pixels))

    def _normalised(self, pixels: Pixels) -> Tensor:
        stack = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._backbone.device)
        return normalise(stack, self._mean, self._std, self._backbone.dtype)


def joined(start: int, batches: list[Recorded]) -> Recorded:
    """Batches as one, layer by layer: what is copied twice is never more than one layer."""
    layers = range(len(batches[0].keys))
    first = torch.cat([batch.first for batch in batches])
    keys, values = [list(batch.keys) for batch in batches], [list(batch.values) for batch in batches]
    batches.clear()
    whole = ([torch.cat([own.pop(0) for own in part]) for _ in layers] for part in (keys, values))
    return Recorded(start, first, next(whole), next(whole))


def in_order(images: Images) -> Generator[Pixels, None, None]:
    """All pictures in their order, `EVAL_BATCH` at a time."""
    return ahead(images, parts(len(images)), None)


def parts(count: int) -> Sequence[Index]:
    return [np.arange(start, min(start + EVAL_BATCH, count)) for start in range(0, count, EVAL_BATCH)]
