"""The engine: pictures and seats in, logits out; one call is one forward, whatever tasks and methods its rows have.

work ─► distinct pictures ─► patch embedding ─► distinct trunk rows ─► lanes ─► forward ─► heads
        (one per image and     (one per picture)   (head-only tasks on one
         normalisation)                             picture share a row,
                                                    and readers read it)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import vit
from .backbone import Backbone
from .batch import ImageInput, ImageSeat, Logits, Pixels, Work, normalise
from .lens import Plain
from .rack import Rack
from .reader import Passing, Pieces, Reads, hidden_tokens
from .residency import Seat
from .transfer import DirectTransfer, Transfer, TransferPool

if TYPE_CHECKING:
    from .graphs import Graphs

Trunk = Callable[[Sequence[ImageSeat], Transfer], Tensor]  # of rows, each another trunk row → pooled features [rows, D]
Item = TypeVar("Item")
CACHED_BYTES = 2.5 * 2**20  # found by trying 1 to 32 rows of ViT-Ti and ViT-B, in float32 and bfloat16, on one thread
LEAST_AT_ONCE = 4
SHARED = "shared"  # the lane of the trunk that readers read, and of head-only rows beside them


def _at_once(backbone: Backbone) -> int:
    """The most rows that go through the blocks together: any number on a device that is the faster the more there are;
    on a CPU, which is not, for each thread as many as whose widest activations stay in its cache. Few also mean few
    shapes, for each of which oneDNN keeps code."""
    if backbone.device.type != "cpu":
        return sys.maxsize
    row = backbone.spec.tokens * backbone.spec.hidden * backbone.dtype.itemsize
    return torch.get_num_threads() * max(LEAST_AT_ONCE, int(CACHED_BYTES // row))


def _parts(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """In order, as evenly as can be, none with more than `most`."""
    parts = -(-len(items) // most)
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


class Engine:
    """Runs in one thread: its methods are not to be called concurrently."""

    def __init__(self, backbone: Backbone, rack: Rack, graphs: Graphs | None = None) -> None:
        self.backbone, self.rack, self.graphs = backbone, rack, graphs
        self._crossings = TransferPool(backbone.device)
        self.ahead = backbone.device.type == "cuda"  # a CPU is through with a batch when it has been begun
        self._at_once = _at_once(backbone)

    def run(self, work: Sequence[Work]) -> list[Logits]:
        """Logits [C] of each row. Rows that carry the very same array object share what can be shared."""
        return self.begin(work)()

    @torch.inference_mode()
    def begin(self, work: Sequence[Work]) -> Callable[[], list[Logits]]:
        """Put a batch under way; what is returned waits for its logits. On CUDA nothing waits before that, so the next
        batch may be begun while this one computes. Pixels are read before this returns; seats stay pinned until the
        answers are there."""
        crossing = self._crossings.take()
        pictures = _Distinct(work, lambda row: (id(row[0]), row[1].mean, row[1].std))
        shown: list[ImageInput] = [(pixels, seat.mean, seat.std) for pixels, seat in pictures.items]
        rows = [(picture, seat) for picture, (_, seat) in zip(pictures.index, work, strict=True)]
        arrived = crossing.arrive(self._logits(partial(self._of_pictures, shown), rows, crossing))
        classes = [self.rack.classes(seat.place) for _, seat in rows]
        return lambda: _cut(arrived(), classes)

    def logits(self, x: Tensor, rows: Sequence[ImageSeat]) -> list[Tensor]:
        """Embedded pictures x [n, N, D] and rows (picture, seat) → logits [C] of each row, where x lies."""
        found = self._logits(partial(self._features, x), rows, DirectTransfer(x.device))
        return [row[: self.rack.classes(seat.place)] for row, (_, seat) in zip(found, rows, strict=True)]

    @torch.inference_mode()
    def embed(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        """The frozen backbone's own pooled features [n, D], with the backbone's own normalisation."""
        own, crossing = self.backbone.spec.preprocess, self._crossings.take()
        shown: list[ImageInput] = [(pixels, own.mean, own.std) for pixels in images]
        self._check(shown)
        x = self._embed(shown, crossing)
        return crossing.arrive(vit.forward(self.backbone, x, Plain()))().float().numpy()

    def _logits(self, trunk_features: Trunk, rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor:
        """→ [rows, most classes], as `Rack.logits` gives them."""
        trunk = _Distinct(rows, lambda row: (row[0], self._trunk_key(row[1])))
        features = trunk_features(trunk.items, crossing)
        own = features[crossing.send(np.array(trunk.index))]
        return self.rack.logits(own, [seat.place for _, seat in rows], crossing)

    def _of_pictures(self, shown: Sequence[ImageInput], rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor:
        """Pooled features [rows, D]: of some rows by graph, where there are graphs, of the others beside them."""
        self._check(shown)
        taken = [] if self.graphs is None else self.graphs.takes(shown, rows)
        found = None
        if self.graphs is not None and taken:
            found = self.graphs.features(shown, [rows[row] for row in taken], crossing)
        if found is None:
            return self._features(self._embed(shown, crossing), rows, crossing)
        left = sorted(set(range(len(rows))) - set(taken))
        beside = [self._beside(shown, [rows[row] for row in left], crossing)] if left else []
        return torch.cat((found, *beside))[crossing.send(np.argsort([*taken, *left]))]

    def _beside(self, shown: Sequence[ImageInput], rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor:
        """Pooled features [rows, D] of rows that no graph took, of the pictures that they show."""
        own = _Distinct([picture for picture, _ in rows], lambda picture: picture)
        x = self._embed([shown[picture] for picture in own.items], crossing)
        return self._features(x, [(at, seat) for at, (_, seat) in zip(own.index, rows, strict=True)], crossing)

    def _trunk_key(self, seat: Seat) -> Hashable:
        """Seats with the same key run the same trunk on the same picture: heads that read the same pooled feature."""
        return self.rack.lane(seat.place) if self.rack.head_only(seat.place) else seat.slot

    def _features(self, x: Tensor, rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor:
        """Pooled features [rows, D], of some rows after the other where all at once are slower."""
        if len(rows) <= self._at_once or any(self.rack.reads(seat.place) for _, seat in rows):
            return self._through_lanes(x, rows, crossing)  # a trunk that is read is computed once for all its readers
        order = [row for members in self._by_lane(rows, None).values() for row in members]
        parts = [self._through_lanes(x, [rows[row] for row in part], crossing) for part in _parts(order, self._at_once)]
        return torch.cat(parts)[crossing.send(np.argsort(order))]

    def _by_lane(self, rows: Sequence[ImageSeat], trunk: _Trunk | None) -> dict[Hashable, list[int]]:
        groups: dict[Hashable, list[int]] = {}
        for row, (_, seat) in enumerate(rows):
            groups.setdefault(self._lane_key(seat, trunk), []).append(row)
        return groups

    def _through_lanes(self, x: Tensor, rows: Sequence[ImageSeat], crossing: Transfer) -> Tensor:
        """Rows go into a lane with their like."""
        trunk = self._trunk(x, rows, crossing)
        groups = self._by_lane(rows, trunk)
        lanes, at, features = [], np.empty(len(rows), np.int64), 0
        if trunk is not None:
            lanes.append(trunk.lane)
            members = groups.pop(SHARED, [])
            at[members] = [trunk.row[rows[row][0]] for row in members]
            features = len(trunk.row)
        for members in groups.values():
            lanes.append(self._lane(x, [rows[row] for row in members], trunk, crossing))
            at[members] = np.arange(features, features + len(members))
            features += len(members)
        order = crossing.send(at)
        return torch.cat(vit.forward_lanes(self.backbone, lanes))[order]

    def _trunk(self, x: Tensor, rows: Sequence[ImageSeat], crossing: Transfer) -> _Trunk | None:
        """What readers read; None where there are none."""
        if not any(self.rack.reads(seat.place) for _, seat in rows):
            return None
        pictures = [picture for picture, seat in rows if self._on_plain_trunk(seat)]
        return _Trunk(self.backbone, x, pictures, crossing)

    def _on_plain_trunk(self, seat: Seat) -> bool:
        return self.rack.plain(seat.place) or self.rack.reads(seat.place)

    def _lane_key(self, seat: Seat, trunk: _Trunk | None) -> Hashable:
        return SHARED if trunk is not None and self.rack.plain(seat.place) else self.rack.lane(seat.place)

    def _lane(self, x: Tensor, rows: Sequence[ImageSeat], trunk: _Trunk | None, crossing: Transfer) -> vit.Lane:
        """Rows with equal `Rack.lane`."""
        pictures = [picture for picture, _ in rows]
        condition = self.rack.gather([seat.place for _, seat in rows], crossing)
        if trunk is None or condition.reads_from is None:
            return vit.Lane.of(x[crossing.send(np.array(pictures))], condition)
        return vit.Lane.reading(condition, trunk.reads(pictures))

    def _check(self, pictures: Sequence[ImageInput]) -> None:
        """Raises ValueError for what `images` would not give, a picture of another size above all."""
        size = self.backbone.spec.image_size
        for pixels, _, _ in pictures:
            if not _whole(pixels, size):
                raise ValueError(f"expected uint8 [{size}, {size}, 3], got {pixels.dtype} {list(pixels.shape)}")

    def _embed(self, pictures: Sequence[ImageInput], crossing: Transfer) -> Tensor:
        """→ [n, N, D], as many pictures at a time as rows go through the blocks: in float32 they take much memory."""
        found = [self._embed_part(part, crossing) for part in _parts(pictures, self._at_once)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _embed_part(self, pictures: Sequence[ImageInput], crossing: Transfer) -> Tensor:
        sent = [at for at, (pixels, _, _) in enumerate(pictures) if pixels.dtype == np.float32]
        own = self._mixed(pictures, sent, crossing) if sent else self._normalised(pictures, crossing)
        return vit.embed(self.backbone, own)

    def _normalised(self, pictures: Sequence[ImageInput], crossing: Transfer) -> Tensor:
        """uint8 crosses to the device; each picture is normalised there with its own mean and std. → [n, 3, S, S]"""
        stack = crossing.stack([pixels for pixels, _, _ in pictures])
        mean, std = crossing.send(np.array([both for _, *both in pictures], np.float32)).unbind(1)
        return normalise(stack, mean, std, self.backbone.dtype)

    def _mixed(self, pictures: Sequence[ImageInput], sent: Sequence[int], crossing: Transfer) -> Tensor:
        """Those at `sent` came normalised and are only rounded to the backbone's dtype. → [n, 3, S, S]"""
        own = [at for at in range(len(pictures)) if at not in set(sent)]
        given = crossing.stack([pictures[at][0] for at in sent]).to(self.backbone.dtype)
        x = given.new_empty(len(pictures), *given.shape[1:])
        x[crossing.send(np.array(sent))] = given
        if own:
            x[crossing.send(np.array(own))] = self._normalised([pictures[at] for at in own], crossing)
        return x


def _cut(logits: Tensor, classes: Sequence[int]) -> list[Logits]:
    """Padded logits [R, ·] on the host → float64 [C_r] of each row."""
    return [row[:count] for row, count in zip(logits.double().numpy(), classes, strict=True)]


def _whole(pixels: Pixels, size: int) -> bool:
    if pixels.dtype == np.float32:
        return pixels.shape == (3, size, size)
    return pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)


class _Trunk:
    """The plain trunk of pictures that readers read, a row each; head-only rows of these take its features.

    x: [n, N, D], embedded pictures; `pictures`: those among them that are wanted, as often as they are.
    """

    def __init__(self, backbone: Backbone, x: Tensor, pictures: Sequence[int], crossing: Transfer) -> None:
        self.row = {picture: row for row, picture in enumerate(dict.fromkeys(pictures))}
        self._passing, self._crossing = Passing(hidden_tokens(backbone.spec)), crossing
        self.lane = vit.Lane(x[crossing.send(np.array(list(self.row)))], Plain(), None, passing=self._passing)

    def reads(self, pictures: Sequence[int]) -> Reads:
        """For readers of these pictures."""
        rows = np.array([self.row[picture] for picture in pictures])
        return Reads(self._passing, Pieces.of(rows, len(self.row), self._crossing))


class _Distinct(Generic[Item]):
    """The distinct items of a sequence by key, and for each item the place of its like among them."""

    def __init__(self, items: Iterable[Item], key: Callable[[Item], Hashable]) -> None:
        self.items: list[Item] = []
        self.index: list[int] = []
        seen: dict[Hashable, int] = {}
        for item in items:
            place = seen.setdefault(key(item), len(self.items))
            if place == len(self.items):
                self.items.append(item)
            self.index.append(place)
