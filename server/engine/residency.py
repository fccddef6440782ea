"""Which lenses are on the rack: each is loaded once, pinned while rows need it, and evicted when least recently used.

    acquire ─► on the rack? ─► pinned seat
                  │ no
                  └► loader thread: store → bundle → lens ─► make room ─► write ─► pinned seat

Lives on the event loop, which owns all of its state; only loading and copying run in the loader thread. Loads are
single-flight per version: concurrent requests for a version wait for the same load.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from server.errors import Unavailable

from .images.decode import Geometry
from .lens import Lens
from .rack import Place, Rack


@dataclass(frozen=True)
class Loaded:
    """A stored version after loading: what a seat needs besides its place."""

    lens: Lens
    labels: tuple[str, ...]
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Seat:
    """A resident version, as rows carry it: its place on the rack, and how its pictures are cut and normalised."""

    task: str
    version: str
    place: Place
    labels: tuple[str, ...]
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def slot(self) -> int:
        return self.place.slot

    @property
    def generation(self) -> int:
        return self.place.generation


Key = tuple[str, str]
Loader = Callable[[str, str], Loaded]


@dataclass(eq=False)
class _Entry:
    """A version that is loading or resident. Each waiting request has pinned it already."""

    ready: asyncio.Task[Seat] = field(init=False)
    pins: int = 0
    held: bool = False
    gone: bool = False  # unloaded: freed when the last pin is released

    @property
    def seat(self) -> Seat | None:
        """The seat; None while the version is loading."""
        done = self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None
        return self.ready.result() if done else None


@dataclass(frozen=True)
class Occupant:
    """A seat, how many requests use it, whether it is pinned by hand, and its device memory."""

    seat: Seat
    in_use: int
    pinned: bool
    bytes: int


@dataclass
class Counts:
    """Totals for the metrics."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class Residency:
    """Seats by (task, version). All methods belong to the event loop's thread.

    Hooks for metrics: `on_load(task, seconds)` after each load, `on_hit(task, times)` when the version is resident or
    already loading, `on_evict(task)`.
    """

    def __init__(
        self,
        rack: Rack,
        loader: Loader,
        executor: Executor,
        *,
        on_load: Callable[[str, float], None] | None = None,
        on_hit: Callable[[str, int], None] | None = None,
        on_evict: Callable[[str], None] | None = None,
    ) -> None:
        self._rack, self._loader, self._executor = rack, loader, executor
        self._on_load, self._on_hit, self._on_evict = on_load, on_hit, on_evict
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # least recently used first
        self._occupied: dict[Place, _Entry] = {}  # includes unloaded versions whose rows are not answered yet
        self._freed = asyncio.Event()
        self.counts = Counts()
        self.revision = 0  # grows whenever the set of resident or pinned versions changes

    async def acquire(self, task: str, version: str) -> Seat:
        """Return a pinned seat; the caller must `release` it. Raises the loader's errors, or Unavailable
        (rack_full)."""
        entry = self._entries.get((task, version))
        if entry is None:
            entry = self._entries[task, version] = _Entry()
            entry.ready = asyncio.create_task(self._load(task, version, entry))
            entry.ready.add_done_callback(partial(self._loaded_or_failed, entry))
        else:
            self._hit(task, version)
        entry.pins += 1
        try:
            return await asyncio.shield(entry.ready)
        except BaseException:
            self._unpin(entry)
            raise

    def count_shared_hits(self, seat: Seat, times: int) -> None:
        """Count `times` hits of a seat that a front end shared locally."""
        self._hit(seat.task, seat.version, times)

    def release(self, seat: Seat) -> None:
        self._unpin(self._occupied[seat.place])

    async def load(self, task: str, version: str) -> None:
        """Make a version resident without using it."""
        self.release(await self.acquire(task, version))

    async def unload(self, task: str, version: str) -> bool:
        """Remove a version from the rack. Returns when no row needs it any more and its memory is free; False if it was
        not resident."""
        entry = self._entries.pop((task, version), None)
        if entry is None:
            return False
        entry.gone = True  # before anything is awaited: the caller may be cancelled meanwhile
        self.revision += 1
        await asyncio.wait([entry.ready])
        if entry.seat is None:  # the load failed: its waiters get the error, and there is nothing to free
            return False
        self._settle(entry)
        while entry.seat.place in self._occupied:
            self._freed.clear()
            await self._freed.wait()
        return True

    async def pin(self, task: str, version: str, on: bool) -> bool:
        """Keep a resident version from being evicted (`on`), or allow eviction again. False if it is not resident."""
        entry = self._entries.get((task, version))
        if entry is None:
            return False
        entry.held = on
        self.revision += 1
        self._settle(entry)
        return True

    # --- facts -------------------------------------------------------------------------------------------------------

    def resident(self, task: str, version: str) -> bool:
        entry = self._entries.get((task, version))
        return entry is not None and entry.seat is not None

    def resident_versions(self, task: str) -> set[str]:
        """Versions on the rack, or loading."""
        return {version for name, version in self._entries if name == task}

    def pinned(self, task: str, version: str) -> bool:
        entry = self._entries.get((task, version))
        return entry is not None and entry.held

    def lens_bytes(self, task: str, version: str) -> int:
        """Device memory of a resident version, 0 if it is not resident."""
        entry = self._entries.get((task, version))
        if entry is None or entry.seat is None:
            return 0
        return self._rack.size_bytes(entry.seat.place)

    def seats(self) -> list[Seat]:
        """All resident seats, least recently used first."""
        return [entry.seat for entry in self._entries.values() if entry.seat is not None]

    def occupants(self) -> list[Occupant]:
        """All resident seats with what keeps them on the rack, least recently used first."""
        return [
            Occupant(entry.seat, entry.pins, entry.held, self._rack.size_bytes(entry.seat.place))
            for entry in self._entries.values()
            if entry.seat is not None
        ]

    def check_integrity(self) -> None:
        self._rack.check_integrity()
        if any(entry.pins < 0 for entry in self._occupied.values()):
            raise AssertionError("a seat was released more often than acquired")
        if len(self._occupied) != self._rack.used_slots:
            raise AssertionError("the rack holds lenses that residency does not know of")

    # --- inside ------------------------------------------------------------------------------------------------------

    async def _load(self, task: str, version: str, entry: _Entry) -> Seat:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            loaded = await loop.run_in_executor(self._executor, self._loader, task, version)
            place = await self._make_room(loaded.lens)
            try:
                await loop.run_in_executor(self._executor, self._rack.write, place, loaded.lens)
            except BaseException:
                self._rack.free(place)
                self._freed.set()
                raise
        except BaseException:
            if self._entries.get((task, version)) is entry:
                del self._entries[task, version]
            raise
        self._occupied[place] = entry
        asyncio.get_running_loop().call_soon(self._changed)  # the seat exists once this task has ended
        self.counts.loads += 1
        if self._on_load is not None:
            self._on_load(task, time.perf_counter() - started)
        return Seat(task, version, place, loaded.labels, loaded.geometry, loaded.mean, loaded.std)

    def _loaded_or_failed(self, entry: _Entry, ready: asyncio.Task[Seat]) -> None:
        """Retrieve the task's error, since possibly no request waits any more, and free a version that was unloaded
        meanwhile."""
        if not ready.cancelled() and ready.exception() is None:
            self._settle(entry)

    async def _make_room(self, lens: Lens) -> Place:
        if not self._rack.can_ever_hold(lens):
            raise Unavailable(
                "the task's lens is larger than the whole rack; the server needs a larger LENSRACK_RACK_BYTES",
                code="rack_full",
            )
        while not self._evict_until(lens):
            self._freed.clear()
            await self._freed.wait()
        return self._rack.allocate(lens)

    def _evict_until(self, lens: Lens) -> bool:
        """Evict the least recently used versions until the lens fits. False if pinned ones leave too little room."""
        for key, entry in list(self._entries.items()):
            if self._rack.can_allocate(lens):
                break
            if entry.seat is not None and entry.pins == 0 and not entry.held:
                del self._entries[key]
                self._free(entry)
                self.counts.evictions += 1
                self.revision += 1
                if self._on_evict is not None:
                    self._on_evict(key[0])
        return self._rack.can_allocate(lens)

    def _hit(self, task: str, version: str, times: int = 1) -> None:
        if not times:
            return
        self.counts.hits += times
        if self._on_hit is not None:
            self._on_hit(task, times)
        if (task, version) in self._entries:  # otherwise it has been unloaded meanwhile
            self._entries.move_to_end((task, version))

    def _changed(self) -> None:
        self.revision += 1

    def _unpin(self, entry: _Entry) -> None:
        entry.pins -= 1
        self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        """After a pin was released: free an unloaded lens with its last pin, and wake loads that wait for room."""
        if entry.pins == 0 and entry.gone:
            self._free(entry)
        self._freed.set()

    def _free(self, entry: _Entry) -> None:
        if entry.seat is not None and self._occupied.pop(entry.seat.place, None) is not None:
            self._rack.free(entry.seat.place)
