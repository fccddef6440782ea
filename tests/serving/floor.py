"""A serving floor without torch: a deterministic engine and a shelf of seats, over the real memory store."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from prompts_store import Backbone, Bundle, Manifest, Preprocess, Store
from server.batching.batcher import Batcher
from server.engine.images.decode import Geometry
from server.serving.answers import Limits
from server.serving.predictor import Predictor

SIZE = 8
FINGERPRINT = "f" * 64
GEOMETRY = Geometry(SIZE, "bicubic", 1.0, "squash")


@dataclass(frozen=True)
class Seat:
    slot: int
    generation: int
    task: str
    version: str
    labels: tuple[str, ...]
    geometry: Geometry


class PlainEngine:
    """Logits that anybody can check: the winner of an image for a seat is (mean pixel + slot) modulo C.

    `gate` closed holds the next forward; `culprit(image)` true makes the whole batch fail, as a real engine would.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[tuple[str, int]]] = []  # (task, mean pixel) of every row that was computed
        self.threads: set[int] = set()
        self.distinct_images: list[int] = []
        self.culprit: Callable[[np.ndarray], bool] = lambda image: False
        self.broken: Exception | None = None
        self.distort: Callable[[np.ndarray], np.ndarray] = lambda logits: logits

    def run(self, work: Sequence[tuple[np.ndarray, Seat]]) -> list[np.ndarray]:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(20)
        self.batches.append([(seat.task, mean(image)) for image, seat in work])
        self.distinct_images.append(len({id(image) for image, _ in work}))
        if any(self.culprit(image) for image, _ in work):
            raise self.broken or RuntimeError("secret path /etc/passwd")
        return [self.distort(logits(image, seat)) for image, seat in work]

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(20)
        return np.stack([np.array([mean(image), 1.0, 2.0], np.float32) for image in images])

    def look(self, image: np.ndarray, seat: Seat) -> Any:
        """As a real engine would tell where it looked: two by two patches, the first as bright as the image's mean."""
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(20)
        grid = np.array([[mean(image) / 1000, 0.1], [0.1, 0.1]])
        looked = SimpleNamespace(grid=grid, prompts=0.25, rest=0.45 - mean(image) / 1000)
        return SimpleNamespace(last=looked, rollout=looked)

    @property
    def rows(self) -> list[tuple[str, int]]:
        return [row for batch in self.batches for row in batch]


def mean(image: np.ndarray) -> int:
    return round(float(image.mean()))


def logits(image: np.ndarray, seat: Any) -> np.ndarray:
    values = np.linspace(0.0, 1.0, len(seat.labels))
    values[(mean(image) + seat.slot) % len(seat.labels)] += 3
    return values


@dataclass(eq=False)
class Shelf:
    """The residency protocol without a device: seats by version, made from the store's bundles; pins are counted."""

    store: Store
    pins: Counter[str] = field(default_factory=Counter)
    shared: Counter[str] = field(default_factory=Counter)  # without asking
    held: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    seats: dict[str, Seat] = field(default_factory=dict)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    before_load: Callable[[str], None] = lambda version: None

    async def acquire(self, task: str, version: str) -> Seat:
        async with self.loading:
            if version not in self.seats:
                self.before_load(version)
                bundle = await asyncio.to_thread(self.store.get, task, version)
                self.seats[version] = self._seated(bundle)
                self.loads.append(version)
        self.pins[version] += 1
        return self.seats[version]

    def _seated(self, bundle: Bundle) -> Seat:
        how = bundle.manifest.preprocess
        geometry = Geometry(how.size, how.interpolation, how.crop_pct, how.crop_mode)
        slot = len(self.loads)
        return Seat(slot, 1, bundle.manifest.task, bundle.version, bundle.manifest.labels, geometry)

    def count_shared_hits(self, seat: Seat, times: int) -> None:
        self.shared[seat.version] += times

    def release(self, seat: Seat) -> None:
        assert self.pins[seat.version] > 0, "released more often than acquired"
        self.pins[seat.version] -= 1

    async def load(self, task: str, version: str) -> None:
        self.release(await self.acquire(task, version))

    async def unload(self, task: str, version: str) -> bool:
        return self.seats.pop(version, None) is not None

    async def pin(self, task: str, version: str, on: bool) -> bool:
        (self.held.add if on else self.held.discard)(version)
        return version in self.seats

    def pinned(self, task: str, version: str) -> bool:
        return version in self.held

    def resident(self, task: str, version: str) -> bool:
        return version in self.seats

    def lens_bytes(self, task: str, version: str) -> int:
        return 1024 if version in self.seats else 0

    @property
    def in_use(self) -> int:
        return self.pins.total()


MANIFEST = Manifest(
    task="fish",
    method="linear",
    backbone=Backbone("stand-in", FINGERPRINT),
    labels=("a", "b", "c"),
    prompt_lengths=(0,),
    preprocess=Preprocess(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "squash"),
    metrics={},
    recipe={},
    dataset=None,
    parent=None,
    created_at=1000.0,
    lensrack_version="0.1.0",
)


def bundle(task: str = "fish", seed: int = 0, labels: Sequence[str] = ("a", "b", "c"), **changes: Any) -> Bundle:
    weight = np.random.default_rng(seed).standard_normal((len(labels), 4), dtype=np.float32)
    manifest = replace(MANIFEST, task=task, labels=tuple(labels), **changes)
    return Bundle.build(manifest, {"head.weight": weight, "head.bias": np.zeros(len(labels), np.float32)})


def publish(store: Store, task: str = "fish", seed: int = 0, **changes: Any) -> str:
    version = store.put(bundle(task, seed, **changes))
    store.set_alias(task, "live", version)
    return version


def png(grey: int = 7, size: int = SIZE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


@dataclass(eq=False)
class Floor:
    """Everything a prediction passes through. Make it inside the event loop that will use it."""

    store: Store
    max_batch: int = 8
    max_queue: int = 64
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        self.engine = PlainEngine()
        self.shelf = Shelf(self.store)
        self.pool = ThreadPoolExecutor(2)
        self.batcher = Batcher(self.engine, max_batch=self.max_batch, max_queue=self.max_queue, wait_s=self.wait_s)
        self.predictor = Predictor(
            self.store,
            self.shelf,
            self.batcher,
            self.pool,
            limits=Limits(max_images=16, max_image_pixels=10_000, max_tasks=20),
            geometry=GEOMETRY,
            fingerprint=FINGERPRINT,
        )

    async def close(self) -> None:
        self.engine.gate.set()
        await self.batcher.drain(5)
        self.pool.shutdown()
