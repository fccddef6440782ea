"""A fit's state between two epochs, as one safetensors file.

Everything random in an epoch is drawn from the recipe's seed and the epoch's number, so there is no generator to keep:
parameters, the optimiser's own tensors and the curves are the whole state, and a fit that goes on from them ends with
the very bits of one that was never interrupted. A search's trials are repeatable as well: which are done, and what they
gave, is all that has to be kept of them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """After `epoch` epochs. optimizer: the optimiser's state by "parameter number/name".

    curves: name → one value an epoch. best: the parameters of the best epoch so far, where the recipe has patience.
    passes: pictures that went through the backbone.
    trials: the finished trials of the search, or the finished fits of the comparison, that this fit belongs to; with
    `epoch` 0 the fit itself has not begun. spent_s, cpu_s: seconds that it has taken, in all its attempts.
    condense, parent: where what was fitted is being condensed, how far that is, and the parameters that it began with;
    the rest is then the state of the refit under way.
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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, flat."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}/{name}": value for number, own in state.items() for name, value in own.items() if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


_GROUPS = ("params", "optimizer", "best", "parent")
_TOLD = ("epoch", "curves", "passes", "trials", "spent_s", "cpu_s", "condense")


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Whole or not at all: temporary file, fsync, rename. Raises OSError, and leaves nothing then."""
    tensors = {
        f"{group}/{name}": value.detach().cpu().contiguous()
        for group in _GROUPS
        for name, value in getattr(checkpoint, group).items()
    }
    told = {name: getattr(checkpoint, name) for name in _TOLD}
    data = save(tensors, {"fit": json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it would hold the last of it
        raise


def read(path: Path) -> Checkpoint | None:
    """None where there is none, or none that can be read: then the fit begins anew, which costs nothing but time."""
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["fit"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        groups: dict[str, Any] = {group: _under(f"{group}/", tensors) for group in _GROUPS}
        return Checkpoint(**{name: told[name] for name in _TOLD if name in told}, **groups)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
