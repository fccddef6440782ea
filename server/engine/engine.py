"""The engine: pictures and seats in, logits out; one call is one forward, for rows of any tasks and methods.

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
from .reader import LiveTrunk, Pieces, Reads, hidden_tokens
from .residency import Seat
from .transfer import DirectTransfer, Transfer, TransferPool

if TYPE_CHECKING:
    from .graphs import Graphs

Trunk = Callable[[Sequence[ImageSeat], Transfer], Tensor]  # distinct trunk rows → pooled features [rows, D]
Item = TypeVar("Item")
CACHED_BYTES = 2.5 * 2**20  # measured with 1 to 32 rows of ViT-Ti and ViT-B, in float32 and bfloat16, on one thread
LEAST_PER_PASS = 4
SHARED = "shared"  # the lane of the trunk that readers read; head-only rows in the same batch use it too


def _rows_per_pass(backbone: Backbone) -> int:
    """The most rows per pass through the blocks: unlimited on a GPU; on a CPU, what fits the cache of each thread. Few
    rows also mean few shapes, and oneDNN caches code for each shape."""
    if backbone.device.type != "cpu":
        return sys.maxsize
    row = backbone.spec.tokens * backbone.spec.hidden * backbone.dtype.itemsize
    return torch.get_num_threads() * max(LEAST_PER_PASS, int(CACHED_BYTES // row))


def _parts(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Split in order into parts of at most `most` items, as even as possible."""
    parts = -(-len(items) // most)
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


class Engine:
    """Runs in one thread: its methods must not be called concurrently."""

    def __init__(self, backbone: Backbone, rack: Rack, graphs: Graphs | None = None) -> None:
        self.backbone, self.rack, self.graphs = backbone, rack, graphs
        self._transfers = TransferPool(backbone.device)
        self.ahead = backbone.device.type == "cuda"  # whether a batch still computes when `begin` returns
        self._rows_per_pass = _rows_per_pass(backbone)

    def run(self, work: Sequence[Work]) -> list[Logits]:
        """Logits [C] of each row. Rows that carry the same array object share all work that can be shared."""
        return self.begin(work)()

    @torch.inference_mode()
    def begin(self, work: Sequence[Work]) -> Callable[[], list[Logits]]:
        """Start a batch; the returned function waits for its logits. On CUDA nothing waits before that, so the next
        batch can begin while this one computes. Pixels are read before this returns; seats stay pinned until the
        answers arrive."""
        transfer = self._transfers.take()
        pictures = _Distinct(work, lambda row: (id(row[0]), row[1].mean, row[1].std))
        images: list[ImageInput] = [(pixels, seat.mean, seat.std) for pixels, seat in pictures.items]
        rows = [(picture, seat) for picture, (_, seat) in zip(pictures.index, work, strict=True)]
        fetched = transfer.start_fetch(self._logits(partial(self._image_features, images), rows, transfer))
        classes = [self.rack.classes(seat.place) for _, seat in rows]
        return lambda: _cut(fetched(), classes)

    def logits(self, x: Tensor, rows: Sequence[ImageSeat]) -> list[Tensor]:
        """Embedded pictures x [n, N, D] and rows (picture, seat) → logits [C] of each row, on x's device."""
        logits = self._logits(partial(self._features, x), rows, DirectTransfer(x.device))
        return [row[: self.rack.classes(seat.place)] for row, (_, seat) in zip(logits, rows, strict=True)]

    @torch.inference_mode()
    def embed(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        """The frozen backbone's own pooled features [n, D], with the backbone's own normalisation."""
        preprocess, transfer = self.backbone.spec.preprocess, self._transfers.take()
        inputs: list[ImageInput] = [(pixels, preprocess.mean, preprocess.std) for pixels in images]
        self._check(inputs)
        x = self._embed(inputs, transfer)
        return transfer.start_fetch(vit.forward(self.backbone, x, Plain()))().float().numpy()

    def _logits(self, trunk_features: Trunk, rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor:
        """Logits [rows, most classes] as `Rack.logits` returns them."""
        trunk = _Distinct(rows, lambda row: (row[0], self._trunk_key(row[1])))
        features = trunk_features(trunk.items, transfer)
        per_row = features[transfer.send(np.array(trunk.index))]
        return self.rack.logits(per_row, [seat.place for _, seat in rows], transfer)

    def _image_features(self, images: Sequence[ImageInput], rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor:
        """Pooled features [rows, D]: of some rows by graph, if there are graphs, of the others by the ordinary
        forward."""
        self._check(images)
        taken = [] if self.graphs is None else self.graphs.rows_by_graph(images, rows)
        by_graph = None
        if self.graphs is not None and taken:
            by_graph = self.graphs.features(images, [rows[row] for row in taken], transfer)
        if by_graph is None:
            return self._features(self._embed(images, transfer), rows, transfer)
        others = sorted(set(range(len(rows))) - set(taken))
        ordinary = [self._ordinary_features(images, [rows[row] for row in others], transfer)] if others else []
        return torch.cat((by_graph, *ordinary))[transfer.send(np.argsort([*taken, *others]))]

    def _ordinary_features(self, images: Sequence[ImageInput], rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor:
        """Pooled features [rows, D] of rows that no graph takes; only their pictures are embedded."""
        distinct = _Distinct([picture for picture, _ in rows], lambda picture: picture)
        x = self._embed([images[picture] for picture in distinct.items], transfer)
        return self._features(x, [(at, seat) for at, (_, seat) in zip(distinct.index, rows, strict=True)], transfer)

    def _trunk_key(self, seat: Seat) -> Hashable:
        """Seats with equal keys share one trunk row per picture: heads that read the same pooled feature."""
        return self.rack.lane(seat.place) if self.rack.head_only(seat.place) else seat.slot

    def _features(self, x: Tensor, rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor:
        """Pooled features [rows, D], in several passes if one pass would be slower."""
        if len(rows) <= self._rows_per_pass or any(self.rack.reads(seat.place) for _, seat in rows):
            return self._through_lanes(x, rows, transfer)  # one pass: all readers of a trunk share it
        order = [row for members in self._by_lane(rows, None).values() for row in members]
        parts = [
            self._through_lanes(x, [rows[row] for row in part], transfer) for part in _parts(order, self._rows_per_pass)
        ]
        return torch.cat(parts)[transfer.send(np.argsort(order))]

    def _by_lane(self, rows: Sequence[ImageSeat], trunk: _Trunk | None) -> dict[Hashable, list[int]]:
        groups: dict[Hashable, list[int]] = {}
        for row, (_, seat) in enumerate(rows):
            groups.setdefault(self._lane_key(seat, trunk), []).append(row)
        return groups

    def _through_lanes(self, x: Tensor, rows: Sequence[ImageSeat], transfer: Transfer) -> Tensor:
        """Pooled features [rows, D] in one pass; rows of equal lane keys form a lane."""
        trunk = self._trunk(x, rows, transfer)
        groups = self._by_lane(rows, trunk)
        lanes, at, features = [], np.empty(len(rows), np.int64), 0
        if trunk is not None:
            lanes.append(trunk.lane)
            members = groups.pop(SHARED, [])
            at[members] = [trunk.row[rows[row][0]] for row in members]
            features = len(trunk.row)
        for members in groups.values():
            lanes.append(self._lane(x, [rows[row] for row in members], trunk, transfer))
            at[members] = np.arange(features, features + len(members))
            features += len(members)
        order = transfer.send(at)
        return torch.cat(vit.forward_lanes(self.backbone, lanes))[order]

    def _trunk(self, x: Tensor, rows: Sequence[ImageSeat], transfer: Transfer) -> _Trunk | None:
        """The trunk that readers read; None without readers."""
        if not any(self.rack.reads(seat.place) for _, seat in rows):
            return None
        pictures = [picture for picture, seat in rows if self._on_plain_trunk(seat)]
        return _Trunk(self.backbone, x, pictures, transfer)

    def _on_plain_trunk(self, seat: Seat) -> bool:
        return self.rack.plain(seat.place) or self.rack.reads(seat.place)

    def _lane_key(self, seat: Seat, trunk: _Trunk | None) -> Hashable:
        return SHARED if trunk is not None and self.rack.plain(seat.place) else self.rack.lane(seat.place)

    def _lane(self, x: Tensor, rows: Sequence[ImageSeat], trunk: _Trunk | None, transfer: Transfer) -> vit.Lane:
        """Rows with equal `Rack.lane`."""
        pictures = [picture for picture, _ in rows]
        condition = self.rack.gather([seat.place for _, seat in rows], transfer)
        if trunk is None or condition.reads_from is None:
            return vit.Lane.of(x[transfer.send(np.array(pictures))], condition)
        return vit.Lane.reading(condition, trunk.reads(pictures))

    def _check(self, images: Sequence[ImageInput]) -> None:
        """Raises ValueError for pixels that `images` never returns: another dtype or size."""
        size = self.backbone.spec.image_size
        for pixels, _, _ in images:
            if not _whole(pixels, size):
                raise ValueError(f"expected uint8 [{size}, {size}, 3], got {pixels.dtype} {list(pixels.shape)}")

    def _embed(self, images: Sequence[ImageInput], transfer: Transfer) -> Tensor:
        """Tokens [n, N, D]; as many pictures at a time as rows per pass, because they take much memory in float32."""
        parts = [self._embed_part(part, transfer) for part in _parts(images, self._rows_per_pass)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _embed_part(self, images: Sequence[ImageInput], transfer: Transfer) -> Tensor:
        normalised_at = [at for at, (pixels, _, _) in enumerate(images) if pixels.dtype == np.float32]
        x = self._mixed(images, normalised_at, transfer) if normalised_at else self._normalised(images, transfer)
        return vit.embed(self.backbone, x)

    def _normalised(self, images: Sequence[ImageInput], transfer: Transfer) -> Tensor:
        """Normalise uint8 pictures on the device, each with its own mean and std. → [n, 3, S, S]"""
        stack = transfer.stack([pixels for pixels, _, _ in images])
        mean, std = transfer.send(np.array([both for _, *both in images], np.float32)).unbind(1)
        return normalise(stack, mean, std, self.backbone.dtype)

    def _mixed(self, images: Sequence[ImageInput], normalised_at: Sequence[int], transfer: Transfer) -> Tensor:
        """Pictures at `normalised_at` came normalised and are only cast to the backbone's dtype. → [n, 3, S, S]"""
        raw_at = [at for at in range(len(images)) if at not in set(normalised_at)]
        normalised = transfer.stack([images[at][0] for at in normalised_at]).to(self.backbone.dtype)
        x = normalised.new_empty(len(images), *normalised.shape[1:])
        x[transfer.send(np.array(normalised_at))] = normalised
        if raw_at:
            x[transfer.send(np.array(raw_at))] = self._normalised([images[at] for at in raw_at], transfer)
        return x


def _cut(logits: Tensor, classes: Sequence[int]) -> list[Logits]:
    """Padded logits [R, ·] on the host → float64 [C_r] of each row."""
    return [row[:count] for row, count in zip(logits.double().numpy(), classes, strict=True)]


def _whole(pixels: Pixels, size: int) -> bool:
    if pixels.dtype == np.float32:
        return pixels.shape == (3, size, size)
    return pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)


class _Trunk:
    """The plain trunk of the pictures that readers read, one row each; head-only rows of these pictures use its
    features.

    x: [n, N, D], embedded pictures; `pictures`: the numbers of those that are read, repetitions allowed.
    """

    def __init__(self, backbone: Backbone, x: Tensor, pictures: Sequence[int], transfer: Transfer) -> None:
        self.row = {picture: row for row, picture in enumerate(dict.fromkeys(pictures))}
        self._live, self._transfer = LiveTrunk(hidden_tokens(backbone.spec)), transfer
        self.lane = vit.Lane(x[transfer.send(np.array(list(self.row)))], Plain(), None, live_trunk=self._live)

    def reads(self, pictures: Sequence[int]) -> Reads:
        """The trunk keys and values for readers of these pictures."""
        rows = np.array([self.row[picture] for picture in pictures])
        return Reads(self._live, Pieces.of(rows, len(self.row), self._transfer))


class _Distinct(Generic[Item]):
    """The distinct items of a sequence by key, and for each item the index of its equal among them."""

    def __init__(self, items: Iterable[Item], key: Callable[[Item], Hashable]) -> None:
        self.items: list[Item] = []
        self.index: list[int] = []
        seen: dict[Hashable, int] = {}
        for item in items:
            place = seen.setdefault(key(item), len(self.items))
            if place == len(self.items):
                self.items.append(item)
            self.index.append(place)
