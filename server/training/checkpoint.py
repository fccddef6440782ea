"""A fit's state between two epochs, as one safetensors file.

All randomness in an epoch is drawn from the recipe's seed and the epoch's number, so no generator has to be stored:
parameters, the optimiser's tensors and the curves are the whole state, and a fit that resumes from them ends with the
same bits as one that was never interrupted. The trials of a search are repeatable as well: only their figures are
stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """The state after `epoch` epochs. optimizer: the optimiser's state by "parameter number/name".

    curves: name → one value an epoch. best: the parameters of the best epoch so far.
    passes: pictures that went through the backbone.
    trials: the finished trials of the search, or the finished fits of the comparison, that this fit belongs to; with
    `epoch` 0 the fit itself has not begun. spent_s, cpu_s: seconds that it has taken, over all attempts.
    condense, parent: only in a condensation: its progress, and the parameters that it began with; the other fields are
    then the state of the current refit.
    """

    epoch: int = 0
    params: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    passes: int = 0
    trials: list[dict[str, Any]] = field(default_factory=list)
    spent_s: float = 0.0
    cpu_s: float = 0.0
    parent: dict[str, Tensor] = field(default_factory=dict)
    condense: dict[str, Any] = field(default_factory=dict)


OnCheckpoint = Callable[[Checkpoint], None]


def ignore_checkpoint(checkpoint: Checkpoint) -> None:
    """The default `on_checkpoint`: nothing is stored, so the fit cannot be resumed."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as a flat mapping."""
    return {
        f"{number}/{name}": value
        for number, tensors in optimizer.state_dict()["state"].items()
        for name, value in tensors.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


_GROUPS = ("params", "optimizer", "best", "parent")
_JSON_FIELDS = ("epoch", "curves", "passes", "trials", "spent_s", "cpu_s", "condense")


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all: temporary file, fsync, rename. Raises OSError, and then leaves no file."""
    tensors = {
        f"{group}/{name}": value.detach().cpu().contiguous()
        for group in _GROUPS
        for name, value in getattr(checkpoint, group).items()
    }
    metadata = {name: getattr(checkpoint, name) for name in _JSON_FIELDS}
    data = save(tensors, {"fit": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # it would occupy the last space of a full disk
        raise


def read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`; None where it is missing or damaged: the fit then starts over."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["fit"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        groups: dict[str, Any] = {group: _under(f"{group}/", tensors) for group in _GROUPS}
        return Checkpoint(**{name: metadata[name] for name in _JSON_FIELDS if name in metadata}, **groups)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
