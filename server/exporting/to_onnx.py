"""A task as one ONNX model: normalisation, backbone, lens and head, for any number of pictures at once.

The exported graph is the serving forward (`vit.forward`), traced with the task's own lens. Input `pixels` is uint8 [B,
S, S, 3], pictures cut as the manifest's `preprocess` says; with `Input.FLOAT` it is normalised pixels, float32 [B, 3,
S, S]. Output `logits` is float32 [B, C]. The model's metadata has labels and preprocessing.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from prompts_store import Bundle
from server.engine import vit
from server.engine.backbone import Backbone
from server.engine.batch import normalise
from server.engine.lens import condition
from server.engine.reader import Reads
from server.errors import NotInstalled
from server.methods.registry import Registry

MAX_BATCH = 4096  # torch.export needs a bound
EXAMPLE = 2  # pictures in the traced batch: torch.export treats a size of 1 as a constant
OPSET = 18


class Input(Enum):
    """The model's input: uint8 pictures or normalised float32 ones."""

    UINT8 = "uint8"
    FLOAT = "float"


def to_onnx(bundle: Bundle, backbone: Backbone, registry: Registry, takes: Input = Input.UINT8) -> bytes:
    """The bytes of the model's file. `backbone`: on the CPU, float32, not packed.

    Raises ServiceError: wrong_backbone, bad_bundle, not_installed.
    """
    registry.check(bundle, backbone.spec)
    program = _exported(OneTask(bundle, backbone, registry, takes), _example(backbone, takes))
    model = program.model_proto
    for name, text in _metadata(bundle, takes).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, text
    return bytes(model.SerializeToString())


class OneTask(nn.Module):
    """Pixels to logits through one lens."""

    def __init__(self, bundle: Bundle, backbone: Backbone, registry: Registry, takes: Input) -> None:
        super().__init__()
        preprocess = bundle.manifest.preprocess
        self._backbone, self._takes = backbone, takes
        self._lens = registry.lower(bundle, backbone)
        self._mean, self._std = torch.tensor([preprocess.mean]), torch.tensor([preprocess.std])

    def forward(self, pixels: Tensor) -> Tensor:
        if self._takes is Input.UINT8:
            pixels = normalise(pixels, self._mean, self._std, self._backbone.dtype)
        x = vit.embed(self._backbone, pixels)
        return vit.classify(vit.forward_lanes(self._backbone, [self._lane(x)])[0], self._lens)

    def _lane(self, x: Tensor) -> vit.Lane:
        """Readers use a recorded trunk: lanes side by side would be split at sizes that the trace treats as
        constants."""
        rows = condition(self._lens, x.shape[0])
        if rows.reads_from is None:
            return vit.Lane.of(x, rows)
        return vit.Lane.reading(rows, Reads(vit.record(self._backbone, x, rows.reads_from)))


def _example(backbone: Backbone, takes: Input) -> Tensor:
    size = backbone.spec.image_size
    if takes is Input.UINT8:
        return torch.zeros(EXAMPLE, size, size, 3, dtype=torch.uint8)
    return torch.zeros(EXAMPLE, 3, size, size)


def _exported(module: OneTask, example: Tensor) -> Any:
    """torch's exporter, without its log messages and warnings."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise NotInstalled("ONNX files need the packages of the extra: pip install 'lensrack[export]'") from error
    quiet = logging.getLogger("onnxscript")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
                verbose=False,
            )
    finally:
        quiet.setLevel(before)


def _metadata(bundle: Bundle, takes: Input) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "task": manifest.task,
        "version": bundle.version,
        "method": manifest.method,
        "backbone": manifest.backbone.fingerprint,
        "input": takes.value,
        "labels": json.dumps(manifest.labels),
        "preprocess": json.dumps(asdict(manifest.preprocess)),
    }
