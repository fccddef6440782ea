"""The frozen backbone's own features: computed once for pictures, whoever fits on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.engine import normalise
from server.engine.lens import Plain

from .data import Images, Pixels
from .together import Ask, Fitting

EVAL_BATCH = 64


class FrozenFeatures:
    """Remembers the features of every `Images` that it has been asked about."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        own = backbone.spec.preprocess
        self._mean = torch.tensor([own.mean], device=backbone.device)
        self._std = torch.tensor([own.std], device=backbone.device)
        self._known: list[tuple[Images, Tensor]] = []

    def of(self, images: Images) -> Fitting[Tensor]:
        """Pooled features [n, D] of the plain backbone."""
        for seen, features in self._known:
            if seen is images:
                return features
        found = []
        for start in range(0, len(images), EVAL_BATCH):
            index = np.arange(start, min(start + EVAL_BATCH, len(images)))
            found.append((yield Ask(self.embedded(images.read(index)), Plain())))
        features = torch.cat(found).clone()
        self._known.append((images, features))
        return features

    @torch.no_grad()
    def embedded(self, pixels: Pixels) -> Tensor:
        """uint8 [B, S, S, 3] → the tokens that enter the first block [B, N, D], with the backbone's normalisation."""
        stack = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._backbone.device)
        return vit.embed(self._backbone, normalise(stack, self._mean, self._std, self._backbone.dtype))
