"""One pretraining run: phases of steps, resumable at any time, with curves beside the weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from server.training import checkpoint
from server.training.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer

from .distil import OBJECTIVES, agreement, loss, pixels, scale
from .views import DRAWINGS, Views

HELD_OUT_VIEWS = 128
SCALE_VIEWS = 64
WARM_UP = 0.01  # share of a run's work
WEIGHT_DECAY = 0.02
VECTOR_SHARE = 0.5  # rate of norms and biases, as a share of the matrices' rate
POSITION_SHARE = 2.0  # that of positions and class token, which grow to twenty times their initial size


@dataclass(frozen=True)
class Phase:
    """`steps` batches of `batch` views, `size` pixels a side.

    Small views come first: most is learned from them at a quarter of the cost.
    """

    objective: str
    size: int
    batch: int
    steps: int

    @classmethod
    def of(cls, text: str) -> Phase:
        """Parse OBJECTIVE:SIZE:BATCH:STEPS. Raises ValueError for anything else."""
        objective, *numbers = text.split(":")
        if objective not in OBJECTIVES or len(numbers) != 3 or not all(number.isdigit() for number in numbers):
            raise ValueError(f"expected {'|'.join(OBJECTIVES)}:SIZE:BATCH:STEPS, got {text!r}")
        size, batch, steps = map(int, numbers)
        return cls(objective, size, batch, steps)

    @property
    def work(self) -> int:
        """Pixels in all views, roughly proportional to the phase's cost."""
        return self.steps * self.batch * self.size**2


@dataclass(frozen=True)
class Step:
    """Step `number` of a run uses the views from `first` on; `done` is the share of the run's work before it."""

    number: int
    phase: Phase
    first: int
    done: float

    @property
    def rate(self) -> float:
        """The learning rate relative to the highest: a short warm-up, then a linear decay to zero.

        While the rate stays high, the error does too: 1,000 steps at 4e-3 left a loss of 2.5, of which 100 steps at
        1e-3 removed a fifth.
        """
        return min((self.done + 1e-4) / WARM_UP, 1 - self.done)


def plan(phases: Sequence[Phase]) -> list[Step]:
    total, done, first = sum(phase.work for phase in phases), 0, SCALE_VIEWS
    steps: list[Step] = []
    for phase in phases:
        for _ in range(phase.steps):
            steps.append(Step(len(steps), phase, first, done / total))
            done, first = done + phase.work // phase.steps, first + phase.batch
    return steps


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def curves(self) -> Path:
        return self.folder / "curves.jsonl"

    @property
    def weights(self) -> Path:
        return self.folder / "backbone.safetensors"


class Run:
    """The distillation of a student. The same arguments and thread count give the same bits, however often the run was
    interrupted. `keep_every`: steps between two checkpoints; each also evaluates the held-out views."""

    def __init__(
        self,
        student: VisionTransformer,
        teacher: VisionTransformer,
        photos: tuple[list[Image.Image], list[Image.Image]],
        phases: Sequence[Phase],
        place: RunFolder,
        *,
        rate: float,
        seed: int,
        keep_every: int,
        device: torch.device,
    ) -> None:
        self._device, self._place, self._keep_every = device, place, keep_every
        self._plan, self._rate = plan(phases), rate
        self._student = student.to(device).train()
        self._teacher = teacher.to(device, torch.bfloat16).eval().requires_grad_(False)
        self._views = Views(photos[0], seed=seed)
        largest = max(phase.size for phase in phases)
        others = Views(photos[1], seed=seed + 1, first_drawing=DRAWINGS)
        self._held_out = self._pixels(others.batch(0, HELD_OUT_VIEWS, largest))
        with self._cheaply():
            sample = self._pixels(self._views.batch(0, SCALE_VIEWS, largest))
            self._scale = scale(self._teacher, sample)
        self._optimizers = _optimizers(self._student)

    def go(self, metadata: dict[str, str]) -> None:
        """Run from the last checkpoint, or from the beginning, to the end; then write the weights in float16 with this
        metadata."""
        done = self._resume()
        with tqdm(total=len(self._plan), initial=done, unit="step", smoothing=0.05) as bar:
            for step, batch in self._batches(done):
                lost, errors = self._step(step, batch)
                bar.update()
                bar.set_postfix_str(f"{step.phase.size} px, loss {lost:.3f}")
                if (step.number + 1) % self._keep_every == 0 or step.number + 1 == len(self._plan):
                    self._keep(step, lost, errors)
        weights = {name: value.detach().cpu().half().contiguous() for name, value in self._student.state_dict().items()}
        save_file(weights, self._place.weights, metadata)

    def _batches(self, done: int) -> Iterator[tuple[Step, NDArray[np.uint8]]]:
        """Every remaining step with its views, which are drawn during the step before."""
        left = self._plan[done:]
        with ThreadPoolExecutor(1) as ahead:
            drawn = [ahead.submit(self._draw, step) for step in left[:1]]
            for step, following in zip(left, [*left[1:], None], strict=True):
                batch = drawn.pop().result()
                if following is not None:
                    drawn.append(ahead.submit(self._draw, following))
                yield step, batch

    def _draw(self, step: Step) -> NDArray[np.uint8]:
        return self._views.batch(step.first, step.phase.batch, step.phase.size)

    def _step(self, step: Step, batch: NDArray[np.uint8]) -> tuple[float, Tensor]:
        for optimizer, share in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate * step.rate * share
        with self._cheaply():
            lost, errors = loss(step.phase.objective, self._student, self._teacher, self._pixels(batch), self._scale)
        lost.backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        for optimizer, _ in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return lost.item(), errors.detach()

    def _pixels(self, batch: NDArray[np.uint8]) -> Tensor:
        return pixels(batch, self._teacher, self._device)

    def _cheaply(self) -> Any:
        """Products in bfloat16; parameters, residual stream and losses stay in float32."""
        return torch.autocast(self._device.type, torch.bfloat16)

    def _keep(self, step: Step, lost: float, errors: Tensor) -> None:
        done = step.number + 1
        self._student.eval()
        with self._cheaply():
            figures = agreement(self._student, self._teacher, self._held_out, self._scale)
        self._student.train()
        tensors = {
            f"{number}/{name}": value
            for number, (optimizer, _) in enumerate(self._optimizers)
            for name, value in optimizer_tensors(optimizer).items()
        }
        checkpoint.write(self._place.state, Checkpoint(done, dict(self._student.state_dict()), tensors))
        point = {"step": done, "views": step.first + step.phase.batch, "size": step.phase.size, "loss": lost, **figures}
        states = [round(error, 4) for error in errors.tolist()]
        with self._place.curves.open("a") as file:
            file.write(json.dumps({**point, "states": states, "cpu_seconds": round(time.process_time())}) + "\n")
        tqdm.write(f"{done}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))

    def _resume(self) -> int:
        saved = checkpoint.read(self._place.state)
        if saved is None:
            self._place.folder.mkdir(parents=True, exist_ok=True)
            self._place.curves.unlink(missing_ok=True)
            return 0
        self._student.load_state_dict(saved.params)
        for number, (optimizer, _) in enumerate(self._optimizers):
            begin = f"{number}/"
            tensors = {name.removeprefix(begin): v for name, v in saved.optimizer.items() if name.startswith(begin)}
            restore_optimizer(optimizer, tensors)
        return saved.epoch


def _optimizers(student: VisionTransformer) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices (Jordan et al., 2024: about half the steps of AdamW), AdamW for everything else.

    The patch embedding is a matrix stored as a convolution: Muon gets it flat. Neighbouring pixels are so alike that
    AdamW takes thousands of steps for it, and every block behind it waits.
    """
    matrices = [value for name, value in student.named_parameters() if name.startswith("blocks.") and value.ndim == 2]
    filters = student.patch_embed.proj.weight
    ids = {id(value) for value in (*matrices, filters)}
    positions = [student.pos_embed, student.cls_token, student.patch_embed.proj.bias]
    ids |= {id(value) for value in positions}
    others = [value for value in student.parameters() if id(value) not in ids]
    adam = torch.optim.AdamW
    muon = _Muon([*matrices, filters], weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [
        (muon, 1.0),
        (adam(others, weight_decay=0.0, betas=(0.9, 0.98)), VECTOR_SHARE),
        (adam(positions, weight_decay=0.0, betas=(0.9, 0.98)), POSITION_SHARE),
    ]


class _Muon(torch.optim.Muon):
    """torch's Muon, for convolutions as well: a parameter [O, I, h, w] is stepped as the matrix [O, I·h·w] that it
    is."""

    def __init__(self, parameters: list[Tensor], **options: Any) -> None:
        self._stored = parameters
        flat = [nn.Parameter(value.detach().flatten(1)) for value in parameters]  # views of the same memory
        assert all(view.data_ptr() == stored.data_ptr() for view, stored in zip(flat, parameters, strict=True))
        super().__init__(flat, **options)

    def step(self, closure: Any = None) -> Any:
        for flat, stored in zip(self.param_groups[0]["params"], self._stored, strict=True):
            flat.grad = None if stored.grad is None else stored.grad.flatten(1)
        result = super().step(closure)  # type: ignore[no-untyped-call]
        self.zero_grad()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for stored in self._stored:
            stored.grad = None
