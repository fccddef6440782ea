"""Loads the backbone that the settings name, and describes it for HTTP and imports, which need no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from prompts_store import Preprocess
from server.engine import backbone as backbones
from server.engine.spec import Spec
from server.importing.format import BackboneShape
from server.importing.importer import Importer, RunningBackbone
from server.methods.registry import Registry
from server.settings import Settings

UNTRAINED_NOTE = (
    "the backbone is `untrained`: a small stand-in with random weights, fit for trying things out; "
    "set LENSRACK_BACKBONE to a trained one for answers worth having"
)


def load_backbone(
    settings: Settings, threads: int, device: str | None = None, *, training: bool = False
) -> backbones.Backbone:
    """The backbone, on `device` or else LENSRACK_DEVICE. `training`: never in 8 bits."""
    torch.set_num_threads(threads)
    return backbones.load(
        settings.backbone,
        settings.backbone_weights,
        device=device or settings.device,
        dtype="auto" if training and settings.dtype == backbones.FLOAT8 else settings.dtype,
        packed=settings.packed,
    )


@dataclass(frozen=True)
class BackboneInfo:
    """What HTTP needs to know of the backbone. `names`: its parameters' shapes by name."""

    spec: Spec
    device: str
    dtype: str
    names: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, backbone: backbones.Backbone) -> BackboneInfo:
        state = backbone.model.state_dict()
        names = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return cls(backbone.spec, str(backbone.device), backbone.precision, names)

    @classmethod
    def from_json(cls, text: str) -> BackboneInfo:
        known = json.loads(text)
        own = known["spec"]["preprocess"]
        preprocess = Preprocess(**{**own, "mean": tuple(own["mean"]), "std": tuple(own["std"])})
        names = {name: tuple(shape) for name, shape in known["names"].items()}
        return cls(Spec(**{**known["spec"], "preprocess": preprocess}), known["device"], known["dtype"], names)

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def on(self, devices: Sequence[str]) -> BackboneInfo:
        """The same for several engines, which differ only in their devices."""
        return replace(self, device=",".join(devices)) if len(devices) > 1 else self


def importer_for(facts: BackboneInfo, registry: Registry) -> Importer:
    spec = facts.spec

    def fingerprint_of(arrays: Mapping[str, NDArray[np.float32]]) -> str:
        return backbones.fingerprint(spec.arch, {name: torch.tensor(array) for name, array in arrays.items()})

    shape = BackboneShape(spec.dim, spec.depth, facts.names)
    own = RunningBackbone(spec.arch, spec.fingerprint, shape, spec.preprocess, fingerprint_of)
    return Importer(own, lambda bundle: registry.check(bundle, spec))
