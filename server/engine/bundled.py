"""The backbone that ships with the project: weights in the repository, and the preprocessing that they were trained
with.

`server/bundled/MODEL_CARD.md` says how it was trained and what it can do.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer

BUNDLED = "bundled"
FOLDER = Path(__file__).resolve().parents[1] / "bundled"
WEIGHTS = FOLDER / "backbone.safetensors"
KEY = "lensrack"  # entry of the file's metadata: JSON with `arch` and `pretrained_cfg`


def create(file: Path = WEIGHTS) -> tuple[str, VisionTransformer]:
    """Return the architecture's name and the model, without its weights, as the file's metadata describes them.

    Raises ValueError if the file is missing or its metadata is.
    """
    try:
        with safe_open(file, "pt") as opened:
            description = json.loads(opened.metadata()[KEY])
        arch, config = str(description["arch"]), dict(description["pretrained_cfg"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the bundled backbone {file.name} cannot be read: {error}") from error
    return arch, timm.create_model(arch, num_classes=0, pretrained_cfg_overlay=config)


def metadata(arch: str, config: dict[str, object]) -> dict[str, str]:
    """The metadata that `create` reads. config: timm's `pretrained_cfg` keys mean, std, interpolation, crop_pct,
    crop_mode."""
    return {KEY: json.dumps({"arch": arch, "pretrained_cfg": config}, sort_keys=True)}
