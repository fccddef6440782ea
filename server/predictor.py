"""One /predict, from bytes to labels.

    "cats@live" ─▶ which version?      alias, digest or prefix; a canary by the request's key
        version ─▶ its seat            on the rack already, or loaded once for everybody who asks; pinned
         images ─▶ pixels              decoded and cut to the seat's geometry, in threads
         pixels ─▶ rows ─▶ logits      queued among the rows of all tasks, answered by one forward
         logits ─▶ labels              softmax and the best k, in float64

An ensemble, "cats@live+candidate", is several versions of one task: their rows go together and their probabilities are
averaged. It costs a row for each version and image, as the authors of VPT advise: one picture in several rows, each
with prompts of its own.

Whatever happens on the way, the seat is given back: when the last row has left the engine, not before.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from prompts_store import Alias, AliasNotFound, VersionInfo, VersionNotFound
from server import metrics, tracing
from server.batching.batcher import Batcher, Room
from server.batching.row import Row
from server.engine.images import Geometry
from server.errors import BadRequest, Conflict, DeadlineExceeded, Internal, Unprocessable
from server.pictures import Image, Pictures, Pixels

TASK = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
TOGETHER = "+"  # between the versions of an ensemble
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{8,63}")

T = TypeVar("T")
Scores = np.ndarray[Any, np.dtype[np.float64]]  # [C], adding up to 1


class SeatLike(Protocol):
    """What a prediction needs to know of a resident version."""

    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def geometry(self) -> Geometry: ...


class Rack(Protocol):
    """Where seats come from: `server.engine.residency.Residency`."""

    async def acquire(self, task: str, version: str) -> Any: ...
    def release(self, seat: Any) -> None: ...


class Catalogue(Protocol):
    """What a prediction asks of the store."""

    def aliases(self, task: str) -> Mapping[str, Alias]: ...
    def versions(self, task: str) -> Sequence[VersionInfo]: ...


@dataclass(frozen=True)
class Limits:
    max_images: int
    max_image_pixels: int
    max_tasks: int


@dataclass(frozen=True)
class Timings:
    """Seconds: decoding all images; the longest wait of a row; the longest forward."""

    decode_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Scored:
    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Answer:
    """`predictions[i]` are the best labels of image i, best first. `versions` gave them, in the order of the request:
    one, or those of an ensemble."""

    task: str
    versions: tuple[str, ...]
    predictions: list[list[Scored]]
    timings: Timings

    @property
    def version(self) -> str:
        """All of them in a word."""
        return TOGETHER.join(self.versions)


@dataclass(frozen=True)
class Features:
    """`vectors` [n, D]: the frozen backbone's features of n images."""

    fingerprint: str
    vectors: np.ndarray[Any, Any]
    timings: Timings


@dataclass(frozen=True)
class Ref:
    """What a client names: a task, and an alias, a version or the beginning of one."""

    task: str
    name: str = "live"

    @classmethod
    def parse(cls, text: str) -> Ref:
        """`task` or `task@name`. Raises BadRequest (bad_task_name), also for an ensemble."""
        refs = cls.parse_all(text)
        if len(refs) > 1:
            raise BadRequest(f"expected one version of a task, got {text[:100]!r}", code="bad_task_name")
        return refs[0]

    @classmethod
    def parse_all(cls, text: str) -> tuple[Ref, ...]:
        """`task`, `task@name` or `task@name+name`. A plus sign that a query has turned into a blank is one, too: no
        name holds either. Raises BadRequest (bad_task_name)."""
        task, at, names = text.partition("@")
        each = re.split("[+ ]", names) if at else ["live"]
        if not TASK.fullmatch(task) or not all(each):
            raise BadRequest(
                f"expected a task name like {TASK.pattern}, optionally followed by @alias or @version, several of them "
                f"with + between, got {text[:100]!r}",
                code="bad_task_name",
            )
        return tuple(cls(task, name) for name in each)

    @property
    def is_version(self) -> bool:
        return _DIGEST.fullmatch(self.name) is not None


def versions_in(text: str) -> int:
    """How many versions a reference asks, and so how many rows a picture costs; of a wrong one anything."""
    return len(re.split("[+ ]", text.partition("@")[2]))


@dataclass(frozen=True)
class _Asking:
    """What belongs to a request rather than to one of its tasks."""

    pictures: Pictures
    room: Room
    key: str
    tenant: str
    deadline: float  # of the batcher's clock


class Predictor:
    """Answers predictions. Belongs to the event loop; `pool` decodes, the batcher's thread computes."""

    def __init__(
        self,
        store: Catalogue,
        residency: Rack,
        batcher: Batcher,
        pool: Executor,
        *,
        limits: Limits,
        geometry: Geometry,
        fingerprint: str,
    ) -> None:
        """`geometry` and `fingerprint` are the bare backbone's, for `embed`."""
        self._store, self._residency, self._batcher, self._pool = store, residency, batcher, pool
        self._limits, self._geometry, self._fingerprint = limits, geometry, fingerprint
        self._asked: dict[str, Counter[str]] = {}

    def within(self, store: Catalogue, residency: Rack) -> Predictor:
        """The same predictor as who may see only a part of store and rack is to have it."""
        narrowed = copy.copy(self)
        narrowed._store, narrowed._residency = store, residency
        return narrowed

    async def predict(
        self, task_ref: str, images: Sequence[Image], top_k: int, *, key: str, tenant: str, timeout_s: float
    ) -> Answer:
        """Ask one task, or an ensemble of its versions, about images.

        Raises ServiceError kinds and the store's errors.
        """
        refs = Ref.parse_all(task_ref)
        with self._asking(images, len(refs), key, tenant, timeout_s) as asking:
            return await in_time(timeout_s, self._ask(refs, top_k, asking))

    async def predict_many(
        self, task_refs: Sequence[str], images: Sequence[Image], top_k: int, *, key: str, tenant: str, timeout_s: float
    ) -> dict[str, Answer | Exception]:
        """Ask many tasks about the same images, decoded once: each task's answer, or what went wrong with it."""
        refs = {text.replace(" ", TOGETHER): Ref.parse_all(text) for text in task_refs}
        with self._asking(images, sum(map(len, refs.values())), key, tenant, timeout_s) as asking:
            asked = [in_time(timeout_s, self._ask(together, top_k, asking)) for together in refs.values()]
            results = await asyncio.gather(*asked, return_exceptions=True)
        return {text: _result(result) for text, result in zip(refs, results, strict=True)}

    async def embed(self, images: Sequence[Image], *, tenant: str, timeout_s: float) -> Features:
        """The frozen backbone's features of images."""
        with self._asking(images, 1, "", tenant, timeout_s) as asking:
            return await in_time(timeout_s, self._embed(asking))

    async def aside(
        self, task_ref: str, image: Image, work: Callable[[Pixels, Any], T], *, key: str, tenant: str, timeout_s: float
    ) -> tuple[str, Any, T]:
        """What `work` makes of an image and its seat, in the engine's thread between two batches; with the version and
        the seat. For what is no prediction, such as where the network looks."""
        ref = Ref.parse(task_ref)
        with self._asking([image], 1, key, tenant, timeout_s) as asking:
            return await in_time(timeout_s, self._aside(ref, work, asking))

    def asked(self, task: str) -> Counter[str]:
        """How often each version of a task has been asked since the start."""
        return self._asked.get(task, Counter())

    async def resolve(self, ref: Ref, key: str) -> str:
        """The version that answers. Raises TaskNotFound, AliasNotFound, VersionNotFound, BadRequest (ambiguous)."""
        if ref.is_version:
            return ref.name
        alias = (await self._aliases(ref.task)).get(ref.name)
        if alias is not None:
            return alias.choose(key)
        if _PREFIX.fullmatch(ref.name):
            return await self.version_like(ref.task, ref.name)
        raise AliasNotFound(ref.task, ref.name)

    async def version_like(self, task: str, text: str) -> str:
        """A version by its digest, which may not exist, or by its unique beginning of at least 8 digits, which does.

        Raises TaskNotFound, VersionNotFound, BadRequest (ambiguous_version).
        """
        if _DIGEST.fullmatch(text):
            return text
        if not _PREFIX.fullmatch(text):
            raise VersionNotFound(task, text)
        infos = await asyncio.to_thread(self._store.versions, task)
        found = [info.version for info in infos if info.version.startswith(text)]
        if not found:
            raise VersionNotFound(task, text)
        if len(found) > 1:
            raise BadRequest(
                f"expected the beginning of one version, got {text!r}, with which {len(found)} versions begin",
                code="ambiguous_version",
            )
        return found[0]

    # --- the steps --------------------------------------------------------------------------------------------------

    async def _ask(self, refs: Sequence[Ref], top_k: int, asking: _Asking) -> Answer:
        """`refs` are of one task."""
        began, task = self._batcher.clock(), refs[0].task
        with tracing.span("predict", {"lensrack.task": task}):
            answer = await self._answer(refs, top_k, asking)
        metrics.TASK_S.labels(metrics.TASKS.label(task)).observe(self._batcher.clock() - began)
        return answer

    async def _answer(self, refs: Sequence[Ref], top_k: int, asking: _Asking) -> Answer:
        with ExitStack() as seats:
            versions, members = [], []
            for ref in refs:
                with tracing.span("seat"):
                    version, seat = await self._take_seat(ref, asking.key)
                hold = _Hold(partial(self._residency.release, seat))
                seats.callback(hold.drop)
                self._asked.setdefault(ref.task, Counter())[version] += 1
                versions.append(version)
                members.append((seat, hold))
            require_same_labels([seat for seat, _ in members], versions)
            rows = [row for seat, hold in members for row in await self._rows(refs[0].task, seat, hold, asking)]
            logits = await _answers(rows, asking.room)
        labels = members[0][0].labels
        scores = mean_scores([probabilities(row) for row in logits], [seat.labels for seat, _ in members])
        predictions = [best(of_image, labels, top_k) for of_image in scores]
        return Answer(refs[0].task, tuple(versions), predictions, _timings(asking, rows))

    async def _rows(self, task: str, seat: Any, hold: _Hold, asking: _Asking) -> list[Row]:
        """A row an image, cut as this version asks."""
        with tracing.span("decode"):
            pixels = await asking.pictures.fitted(seat.geometry)
        rows = [self._row(task, seat, image, hold, asking) for image in pixels]
        asking.pictures.show(rows)
        return rows

    async def _aside(self, ref: Ref, work: Callable[[Pixels, Any], T], asking: _Asking) -> tuple[str, Any, T]:
        version, seat = await self._take_seat(ref, asking.key)
        try:
            [pixels] = await asking.pictures.fitted(seat.geometry)
            return version, seat, await self._batcher.aside(lambda: work(pixels, seat))
        finally:
            self._residency.release(seat)

    async def _embed(self, asking: _Asking) -> Features:
        pixels = await asking.pictures.fitted(self._geometry)
        rows = [self._row("", None, image, _Hold(_nothing), asking) for image in pixels]
        vectors = np.stack(await _answers(rows, asking.room))
        _check_finite(vectors)
        return Features(self._fingerprint, vectors, _timings(asking, rows))

    async def _take_seat(self, ref: Ref, key: str) -> tuple[str, Any]:
        version = await self.resolve(ref, key)
        try:
            return version, await self._residency.acquire(ref.task, version)
        except VersionNotFound:
            if ref.is_version:
                raise
        # the alias moved on and the version was deleted between the two steps: ask once more
        version = await self.resolve(ref, key)
        return version, await self._residency.acquire(ref.task, version)

    def _row(self, task: str, seat: Any, image: Pixels, hold: _Hold, asking: _Asking) -> Row:
        reply = asyncio.get_running_loop().create_future()
        row = Row(task, asking.tenant, seat, image, asking.deadline, self._batcher.clock(), reply)
        row.leave = hold.share()
        return row

    # --- what the steps lean on -------------------------------------------------------------------------------------

    async def _aliases(self, task: str) -> Mapping[str, Alias]:
        """From memory where the store remembers them; otherwise in a thread, for a store may touch a disk or a wire."""
        known: Callable[[str], Mapping[str, Alias] | None] | None = getattr(self._store, "known_aliases", None)
        aliases = known(task) if known is not None else None
        return aliases if aliases is not None else await asyncio.to_thread(self._store.aliases, task)

    def _check_size(self, images: int, tasks: int) -> None:
        if not 1 <= images <= self._limits.max_images:
            raise Unprocessable(f"images: expected 1 to {self._limits.max_images}, got {images}")
        if not 1 <= tasks <= self._limits.max_tasks:
            raise Unprocessable(f"task: expected 1 to {self._limits.max_tasks} tasks and versions, got {tasks}")
        if images * tasks > self._batcher.max_queue:
            raise Unprocessable(
                f"expected at most {self._batcher.max_queue} images x tasks in one request, got {images * tasks}"
            )

    @contextmanager
    def _asking(
        self, images: Sequence[Image], tasks: int, key: str, tenant: str, timeout_s: float
    ) -> Iterator[_Asking]:
        """A request's room in the queue and its images; neither outlives it."""
        self._check_size(len(images), tasks)
        with self._batcher.promise(len(images) * tasks) as room:
            shown = Pictures(images, self._pool, self._limits.max_image_pixels)
            try:
                yield _Asking(shown, room, key, tenant, self._batcher.clock() + timeout_s)
            finally:
                shown.close()
                if shown.decode_s:
                    metrics.DECODE_S.observe(shown.decode_s)


@dataclass(eq=False)
class _Hold:
    """A seat in use by a request and its rows; given back when the last of them lets go."""

    release: Callable[[], None]
    users: int = field(default=1)

    def share(self) -> Callable[[], None]:
        self.users += 1
        return self.drop

    def drop(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.release()


def _nothing() -> None:
    """There is no seat to give back."""


async def _answers(rows: Sequence[Row], room: Room) -> list[np.ndarray[Any, Any]]:
    """Queue rows and wait for all replies; on the way out, whatever the reason, nobody waits for one any more."""
    room.submit(rows)
    try:
        return list(await asyncio.gather(*(row.reply for row in rows)))
    finally:
        for row in rows:
            row.reply.cancel()


async def in_time(timeout_s: float, work: Awaitable[T]) -> T:
    """Wait at most so long. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise DeadlineExceeded(f"the answer was not ready within {timeout_s:g} s") from error


def probabilities(logits: np.ndarray[Any, Any]) -> Scores:
    """Softmax in float64. logits: [C]. Raises Internal (engine_failed) for logits that are not finite."""
    wide = np.asarray(logits, np.float64)
    _check_finite(wide)
    scores: Scores = np.exp(wide - wide.max())
    scores /= scores.sum()
    return scores


def mean_scores(rows: Sequence[Scores], labels: Sequence[Sequence[str]]) -> list[Scores]:
    """The mean over the members of an ensemble, in the first one's order of labels: [C] of each image.

    `rows` are the first member's for each image, then the second's, …; labels[m] names member m's classes.
    """
    images = len(rows) // len(labels)
    total = [np.zeros(len(labels[0])) for _ in range(images)]
    for member, own in enumerate(labels):
        place = {label: index for index, label in enumerate(own)}
        order = [place[label] for label in labels[0]]
        for image in range(images):
            total[image] += rows[member * images + image][order]
    return [scores / len(labels) for scores in total]


def require_same_labels(seats: Sequence[SeatLike], versions: Sequence[str]) -> None:
    """Raises Conflict (labels_differ): probabilities of different classes have no mean."""
    first = set(seats[0].labels)
    for seat, version in zip(seats, versions, strict=True):
        if odd := sorted(first.symmetric_difference(seat.labels)):
            raise Conflict(
                f"an ensemble's versions must have the same labels: {versions[0][:12]} and {version[:12]} differ in "
                f"{', '.join(repr(label[:40]) for label in odd[:5])}{' …' if len(odd) > 5 else ''}",
                code="labels_differ",
            )


def best(scores: Scores, labels: Sequence[str], top_k: int) -> list[Scored]:
    """The `top_k` most likely labels (all, where there are fewer); ties by index. scores: [C]."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Scored(labels[i], int(i), float(scores[i])) for i in order]


def _check_finite(numbers: np.ndarray[Any, Any]) -> None:
    if not np.isfinite(numbers).all():
        raise Internal("the engine gave numbers that are not finite", code="engine_failed")


def _timings(asking: _Asking, rows: Sequence[Row]) -> Timings:
    return Timings(
        decode_s=asking.pictures.decode_s,
        queue_s=max(row.watch.queue_s for row in rows),
        compute_s=max(row.watch.compute_s for row in rows),
    )


def _result(result: Answer | BaseException) -> Answer | Exception:
    if isinstance(result, BaseException) and not isinstance(result, Exception):
        raise result
    return result
