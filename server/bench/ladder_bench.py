"""What the rows of `bench ladder` share: pictures, tasks, one model, and the exact answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from server.engine import reference, vit
from server.engine.backbone import Backbone, load_weights
from server.engine.batch import Work, normalise
from server.engine.engine import Engine
from server.engine.graph_recording import record_buckets
from server.engine.graphs import Graphs
from server.engine.images.decode import Geometry
from server.engine.lens import Lens
from server.engine.packed import can_pack
from server.engine.rack import Rack
from server.engine.recorder import CudaRecorder
from server.engine.residency import Seat
from server.engine.transfer import DirectTransfer, Transfer, TransferPool
from server.methods.method import Params
from server.methods.vpt_deep import VptDeep

METHOD = VptDeep()
CLASSES = 10
CPU = torch.device("cpu")
HALF = (0.5,) * 3  # mean and std of every picture, of full scale
Answer = Callable[[], Tensor]  # returns logits [tasks, CLASSES]
Drawn = tuple[Params, tuple[int, ...]]  # a task's parameters, and the number of prompts of each layer


class NotAvailable(RuntimeError):
    """This machine or this build of PyTorch cannot run the step; the message says what is missing."""


class Bench:
    """Pictures [tasks, 3, S, S], one task each with its own prompts, and one timm model for all rows."""

    def __init__(self, arch: str, tasks: int, prompts: int, *, weights: Path | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.arch, self.tasks = arch, tasks
        self.model: VisionTransformer = timm.create_model(arch, num_classes=0).eval().requires_grad_(False)
        if weights is not None:
            load_weights(self.model, weights)
        self.plain = self.backbone()
        size = self.plain.spec.image_size
        self.pixels = torch.randn(tasks, 3, size, size)
        self.pictures = np.random.default_rng(seed).integers(0, 256, (tasks, size, size, 3), np.uint8)
        self.lengths = METHOD.prompt_lengths(self.plain.spec, prompts)
        self.even = [self._drawn(task, self.lengths) for task in range(tasks)]

    @cached_property
    def ragged(self) -> list[Drawn]:
        """Tasks with 0 … p prompts, a different number for each."""
        most, last = self.lengths[0], max(1, self.tasks - 1)
        return [self._drawn(task, (task * most // last,) * len(self.lengths)) for task in range(self.tasks)]

    @cached_property
    def packed(self) -> Backbone:
        """The engine's float32 backbone, for rows that do not change it."""
        return self.backbone(packed=True)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """The first task's head."""
        params, _ = self.even[0]
        return params["head.weight"], params["head.bias"]

    def backbone(
        self, dtype: torch.dtype = torch.float32, *, packed: bool = False, float8: bool = False, device: object = CPU
    ) -> Backbone:
        if packed and not can_pack(CPU, dtype):
            raise NotAvailable(f"this machine or build of PyTorch packs no {dtype} weights")
        model = timm.create_model(self.arch, num_classes=0)
        model.load_state_dict(self.model.state_dict())
        where = torch.device(str(device))
        return Backbone.of(self.arch, model, device=where, dtype=dtype, packed=packed, float8=float8)

    def _drawn(self, task: int, lengths: Sequence[int]) -> Drawn:
        drawn = METHOD.init(self.plain.spec, tuple(lengths), CLASSES, torch.Generator().manual_seed(task))
        drawn["head.weight"] = torch.randn(drawn["head.weight"].shape, generator=torch.Generator().manual_seed(task))
        return drawn, tuple(lengths)

    # --- answers ------------------------------------------------------------------------------------------------------

    def literal(
        self, dtype: torch.dtype = torch.float32, tasks: Sequence[Drawn] | None = None, pixels: Tensor | None = None
    ) -> Answer:
        """Answers task by task, as in the papers."""
        backbone, images = self.backbone(dtype), self.pixels if pixels is None else pixels
        cast = [
            ({name: value.to(dtype) for name, value in params.items()}, lengths)
            for params, lengths in tasks or self.even
        ]

        def answer() -> Tensor:
            rows = zip(images.to(dtype), cast, strict=True)
            return torch.cat([reference.vpt_deep(backbone, row[None], *drawn) for row, drawn in rows])

        return inferred(answer)

    def served(self, backbone: Backbone, tasks: Sequence[Drawn] | None = None) -> Answer:
        """Answers all rows in one forward of the engine. tasks: the `even` ones by default."""
        rack, seats = self.seat_lenses(backbone, self.lenses(backbone, tasks or self.even))
        return self.answer_rows(Engine(backbone, rack), seats, range(self.tasks))

    def answer_rows(self, engine: Engine, seats: Sequence[Seat], rows: Sequence[int]) -> Answer:
        """Logits [rows, CLASSES] of some of the pictures, each for its own task."""
        backbone, pixels = engine.backbone, self.pixels[rows[0] : rows[-1] + 1]
        image_seats = [(row - rows[0], seats[row]) for row in rows]
        return inferred(lambda: torch.stack(engine.logits(vit.embed(backbone, pixels.to(backbone.dtype)), image_seats)))

    @torch.inference_mode()
    def lenses(self, backbone: Backbone, tasks: Sequence[Drawn]) -> list[Lens]:
        return [
            METHOD.lower(
                backbone, {name: value.to(backbone.device, backbone.dtype) for name, value in params.items()}, lengths
            )
            for params, lengths in tasks
        ]

    def seat_lenses(self, backbone: Backbone, lenses: Sequence[Lens]) -> tuple[Rack, list[Seat]]:
        """The lenses on a rack of their own, which has room for the recording of graphs."""
        vectors = self.tasks * 10_000
        rack = Rack(
            dim=backbone.spec.dim, slots=len(lenses) + 3, vectors=vectors, device=backbone.device, dtype=backbone.dtype
        )
        geometry, seats = Geometry(backbone.spec.image_size, "bicubic", 1.0, "center"), []
        for task, lens in enumerate(lenses):
            place = rack.allocate(lens)
            rack.write(place, lens)
            seats.append(Seat(f"task-{task}", "0" * 64, place, ("a",) * CLASSES, geometry, HALF, HALF))
        return rack, seats

    def from_images(
        self, backbone: Backbone, lenses: Sequence[Lens], *, pinned: bool = True, graphs: GraphsOf | None = None
    ) -> Answer:
        """Answers `pictures`, from uint8 to logits on the host: the whole path of a batch. `pinned`: whether the host
        stages copies for a GPU in pinned memory, as the engine does."""
        rack, seats = self.seat_lenses(backbone, lenses)
        engine = Engine(backbone, rack, None if graphs is None else graphs(backbone, rack))
        if not pinned:
            engine._transfers = Unpinned(backbone.device)
        work: list[Work] = list(zip(self.pictures, seats, strict=True))
        return lambda: torch.from_numpy(np.stack(engine.run(work)))

    def graphs(self, backbone: Backbone, rack: Rack) -> Graphs:
        buckets = [(self.tasks, self.lengths[0])]
        graphs = record_buckets(backbone, rack, partial(CudaRecorder, backbone.device), buckets)
        if not graphs.graphs:
            raise NotAvailable("the graph was refused")
        return graphs


GraphsOf = Callable[[Backbone, Rack], Graphs]


class Unpinned(TransferPool):
    """Transfers from memory that is not pinned: the host waits for each copy."""

    def take(self) -> Transfer:
        return DirectTransfer(self._device)


# --- exact answers ----------------------------------------------------------------------------------------------------


def exact(bench: Bench) -> Answer:
    return bench.literal(torch.float64)


def exact_ragged(bench: Bench) -> Answer:
    return bench.literal(torch.float64, bench.ragged)


def exact_images(bench: Bench) -> Answer:
    return bench.literal(torch.float64, pixels=_normalised(bench))


def exact_images_ragged(bench: Bench) -> Answer:
    return bench.literal(torch.float64, bench.ragged, _normalised(bench))


def _normalised(bench: Bench) -> Tensor:
    half = torch.full((bench.tasks, 3), HALF[0], dtype=torch.float64)
    return normalise(torch.from_numpy(bench.pictures), half, half, torch.float64)


@dataclass(frozen=True)
class Drift:
    """drift: largest difference from the exact logits, in their standard deviations; agree: share of pictures with the
    same first label."""

    drift: float
    agree: float

    @classmethod
    def of(cls, logits: Tensor, truth: NDArray[np.float64]) -> Drift:
        answers = logits.double().numpy()
        agree = float((answers.argmax(1) == truth.argmax(1)).mean())
        return cls(float(np.abs(answers - truth).max() / truth.std()), agree)


@dataclass(frozen=True)
class Step:
    """A row of the ladder. `start` builds what is timed, or raises NotAvailable; `taken`: whether the engine does this;
    `timed`: whether its time is meaningful here; `truth`: the exact answer, None if the step answers less."""

    name: str
    start: Callable[[Bench], Answer]
    taken: bool
    why: str = ""
    timed: bool = True
    truth: Callable[[Bench], Answer] | None = exact


def inferred(answer: Answer) -> Answer:
    def once() -> Tensor:
        with torch.inference_mode():
            return answer()

    return once


def under(patch: Callable[[], AbstractContextManager[object]], answer: Answer) -> Answer:
    def once() -> Tensor:
        with patch():
            return answer()

    return once
