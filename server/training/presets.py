"""Published recipes by name: the recipe of a paper, and the grid that its authors searched.

`vpt`   Jia et al., Visual Prompt Tuning, ECCV 2022, appendix table 7: SGD, cosine, 10 of 100 epochs of warm-up. The
        centre of the grid is the run of the authors' demonstration (base_lr 1, weight decay 0.001, batches of 64).
`cvpt`  CVPT, ICCV 2025: AdamW, 10 of 100 epochs of warm-up.

Prompt dropout is the methods' own default: 0.1 for deep prompts and none for shallow ones, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from server.errors import Unprocessable

Grid = tuple[Mapping[str, Any], ...]
RATES: Final = ("lr", "base_lr")  # two forms of the learning rate


@dataclass(frozen=True)
class Preset:
    """`fields`: of a Recipe. `grid`: the changes of them that a search tries, from the centre outwards."""

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


def find_preset(name: str) -> Preset:
    """The preset of this name. Raises Unprocessable (invalid_request)."""
    if name not in PRESETS:
        raise Unprocessable(f"unknown preset {name!r}: expected {' or '.join(map(repr, PRESETS))}")
    return PRESETS[name]


def overlaid(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` over `defaults`. A learning rate in `fields` replaces one of the other form, too."""
    has_rate = any(rate in fields for rate in RATES)
    kept = {name: value for name, value in defaults.items() if not (has_rate and name in RATES)}
    return {**kept, **fields}
