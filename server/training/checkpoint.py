"""A fit's state between two epochs, as one safetensors file.

Everything random in an epoch is drawn from the recipe's seed and the epoch's number, so there is no generator to keep:
parameters, the optimiser's own tensors and the curves are the whole state, and a fit that goes on from them ends with
the very bits of one that was never interrupted.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """After `epoch` epochs. optimizer: the optimiser's state by "parameter number/name"."""

    epoch: int
    params: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    losses: list[float]
    accuracies: list[float]


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


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Whole or not at all: temporary file, fsync, rename."""
    tensors = {f"params/{name}": value for name, value in checkpoint.params.items()}
    tensors |= {f"optimizer/{name}": value for name, value in checkpoint.optimizer.items()}
    told = {"epoch": checkpoint.epoch, "losses": checkpoint.losses, "accuracies": checkpoint.accuracies}
    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, {"fit": json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: Path) -> Checkpoint | None:
    """None where there is none, or none that can be read: then the fit begins anew, which costs nothing but time."""
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["fit"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        return Checkpoint(
            epoch=told["epoch"],
            params=_under("params/", tensors),
            optimizer=_under("optimizer/", tensors),
            losses=told["losses"],
            accuracies=told["accuracies"],
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
