"""Published recipes by name: what a paper's authors trained with, and the grid that they searched.

`vpt`   Jia et al., Visual Prompt Tuning, ECCV 2022, appendix table 7: SGD, cosine, 10 of 100 epochs to warm up. A run
        of the authors' own demonstration (base_lr 1, weight decay 0.001, batches of 64) stands in the middle.
`cvpt`  CVPT, ICCV 2025: AdamW, 10 of 100 epochs to warm up.

Prompt dropout is the methods' own default: 0.1 for deep prompts and none for shallow ones, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from server.errors import Unprocessable

Grid = tuple[Mapping[str, Any], ...]
RATES: Final = ("lr", "base_lr")  # two ways to say the same


@dataclass(frozen=True)
class Preset:
    """`fields`: of a Recipe. `grid`: what a search tries, as changes of them, from the middle outwards."""

    fields: Mapping[str, Any]
    grid: Grid


def _grid(
    rate: str, rates: tuple[float, ...], decays: tuple[float, ...], optimizer: str
) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {"optimizer": optimizer, rate: value, "weight_decay": decay} for decay, value in product(decays, rates)
    )


PRESETS: Final[Mapping[str, Preset]] = {
    "vpt": Preset(
        {
            "optimizer": "sgd",
            "momentum": 0.9,
            "base_lr": 1.0,
            "weight_decay": 1e-3,
            "batch_size": 64,
            "epochs": 100,
            "warmup_epochs": 10,
        },
        _grid("base_lr", (1.0, 2.5, 0.5, 5.0, 0.25, 10.0, 0.1, 25.0, 0.05, 50.0), (1e-3, 1e-4, 1e-2, 0.0), "sgd"),
    ),
    "cvpt": Preset(
        {
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "batch_size": 32,
            "epochs": 100,
            "warmup_epochs": 10,
        },
        _grid("lr", (1e-3, 5e-3, 2e-4, 1e-2), (0.05, 1e-5), "adamw"),
    ),
}


def published(name: str) -> Preset:
    """Raises Unprocessable (invalid_request)."""
    if name not in PRESETS:
        raise Unprocessable(f"unknown preset {name!r}: expected {' or '.join(map(repr, PRESETS))}")
    return PRESETS[name]


def beneath(asked: Mapping[str, Any], suggested: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for on top of what is suggested; a rate that is asked for replaces one said the other way."""
    rated = any(rate in asked for rate in RATES)
    kept = {name: value for name, value in suggested.items() if not (rated and name in RATES)}
    return {**kept, **asked}
