"""Evaluates a bundle on labelled pictures, which are cut and answered as in the server.

Labels are matched by name, so that two bundles whose labels differ in order and number can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prompts_store import Bundle
from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.batch import normalise
from server.engine.images.decode import Geometry
from server.engine.lens import condition
from server.engine.residency import Loaded
from server.errors import ServiceError
from server.methods.registry import Registry

# The largest loss of a picture in nats: that of a label which the bundle does not know or gives a probability of 0.
MOST_NLL = 100.0

Batch = tuple[NDArray[np.uint8], Sequence[str]]  # pictures [B, S, S, 3] and their labels [B]
Batches = Callable[[Geometry], Iterable[Batch]]


class UnservableBundle(Exception):
    """This backbone cannot serve the bundle; `code` and `detail` are those of the cause."""

    def __init__(self, cause: ServiceError) -> None:
        super().__init__(cause.detail)
        self.code, self.detail = cause.code, cause.detail


@dataclass(frozen=True)
class Score:
    """`accuracy`: top-1. `nll`: the mean negative log-likelihood of the right label, in nats. `images`: how many
    pictures these are means of."""

    accuracy: float
    nll: float
    images: int = 0

    def better_than(self, other: Score) -> bool:
        return (self.accuracy, -self.nll) > (other.accuracy, -other.nll)


def evaluate(bundle: Bundle, backbone: Backbone, registry: Registry, batches: Batches) -> Score:
    """The score of a bundle. `batches` returns the pictures in a given geometry. Raises UnservableBundle."""
    loaded = _load(bundle, backbone, registry)
    number = {label: index for index, label in enumerate(loaded.labels)}
    hits, losses = [], []
    for pictures, labels in batches(loaded.geometry):
        targets = torch.tensor([number.get(label, -1) for label in labels])
        scores = F.log_softmax(_logits(backbone, loaded, pictures), dim=1)  # [B, C]
        hits.append(scores.argmax(1) == targets)
        losses.append(_nll(scores, targets))
    right, nll = torch.cat(hits).double(), torch.cat(losses)
    return Score(round(right.mean().item(), 6), round(nll.mean().item(), 6), len(right))


def _load(bundle: Bundle, backbone: Backbone, registry: Registry) -> Loaded:
    try:
        return registry.load(bundle, backbone)
    except ServiceError as error:
        raise UnservableBundle(error) from error


def _nll(scores: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [B, C] and targets [B], -1 for unknown labels → losses [B]."""
    known = targets >= 0
    losses = -scores[torch.arange(len(targets)), targets.clamp(min=0)]
    return torch.where(known, losses.clamp(max=MOST_NLL), MOST_NLL)


@torch.inference_mode()
def _logits(backbone: Backbone, loaded: Loaded, pictures: NDArray[np.uint8]) -> Tensor:
    """[B, S, S, 3] → [B, C] in float64 on the CPU."""
    device, lens = backbone.device, loaded.lens
    mean, std = torch.tensor([loaded.mean], device=device), torch.tensor([loaded.std], device=device)
    x = vit.embed(backbone, normalise(torch.from_numpy(pictures).to(device), mean, std, backbone.dtype))
    features = vit.forward(backbone, x, condition(lens, len(pictures)))
    return vit.classify(features, lens).double().cpu()
