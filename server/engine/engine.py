"""The engine: pictures and seats in, logits out; one call is one forward, whatever tasks and methods its rows have.

work ─► distinct pictures ─► patch embedding ─► distinct trunk rows ─► lanes ─► forward ─► heads
        (one per image and     (one per picture)   (head-only tasks on one
         normalisation)                             picture share a row,
                                                    and readers read it)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import vit
from .backbone import Backbone
from .lens import Plain
from .rack import Rack
from .reader import Passing, Pieces, Reads, hidden_tokens
from .residency import Seat

Pixels = NDArray[np.uint8] | NDArray[np.float32]  # uint8 [S, S, 3], or float32 [3, S, S] that is normalised already
Logits = NDArray[np.float64]  # [C]
Work = tuple[Pixels, Seat]
Item = TypeVar("Item")
SHARED = "shared"  # the lane of the trunk that readers read, and of head-only rows beside them


class Engine:
    """Runs in one thread: `run` and `embed` are not to be called concurrently."""

    def __init__(self, backbone: Backbone, rack: Rack) -> None:
        self.backbone, self.rack = backbone, rack

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> list[Logits]:
        """Logits [C] of each row. Rows that carry the very same array object share what can be shared."""
        pictures = _Distinct(work, lambda row: (id(row[0]), row[1].mean, row[1].std))
        x = self._embed([(pixels, seat.mean, seat.std) for pixels, seat in pictures.items])
        rows = [(picture, seat) for picture, (_, seat) in zip(pictures.index, work, strict=True)]
        return [row.double().cpu().numpy() for row in self.logits(x, rows)]

    def logits(self, x: Tensor, rows: Sequence[tuple[int, Seat]]) -> list[Tensor]:
        """Embedded pictures x [n, N, D] and rows (picture, seat) → logits [C] of each row."""
        trunk = _Distinct(rows, lambda row: (row[0], self._trunk_key(row[1])))
        features = self._features(x, trunk.items)
        return self.rack.heads(features[trunk.index], [seat.place for _, seat in rows])

    @torch.inference_mode()
    def embed(self, images: Sequence[Pixels]) -> NDArray[np.float32]:
        """The frozen backbone's own pooled features [n, D], with the backbone's own normalisation."""
        own = self.backbone.spec.preprocess
        x = self._embed([(pixels, own.mean, own.std) for pixels in images])
        return vit.forward(self.backbone, x, Plain()).float().cpu().numpy()

    def _trunk_key(self, seat: Seat) -> Hashable:
        """Seats with the same key run the same trunk on the same picture: heads that read the same pooled feature."""
        return self.rack.lane(seat.place) if self.rack.head_only(seat.place) else seat.slot

    def _features(self, x: Tensor, rows: Sequence[tuple[int, Seat]]) -> Tensor:
        """Pooled features [rows, D]; rows go into a lane with their like."""
        trunk = self._trunk(x, rows)
        groups: dict[Hashable, list[int]] = {}
        for row, (_, seat) in enumerate(rows):
            groups.setdefault(self._lane_key(seat, trunk), []).append(row)
        lanes, at, features = [], np.empty(len(rows), np.int64), 0
        if trunk is not None:
            lanes.append(trunk.lane)
            members = groups.pop(SHARED, [])
            at[members] = [trunk.row[rows[row][0]] for row in members]
            features = len(trunk.row)
        for members in groups.values():
            lanes.append(self._lane(x, [rows[row] for row in members], trunk))
            at[members] = np.arange(features, features + len(members))
            features += len(members)
        return torch.cat(vit.forward_lanes(self.backbone, lanes))[at]

    def _trunk(self, x: Tensor, rows: Sequence[tuple[int, Seat]]) -> _Trunk | None:
        """What readers read; None where there are none."""
        if not any(self.rack.reads(seat.place) for _, seat in rows):
            return None
        return _Trunk(self.backbone, x, [picture for picture, seat in rows if self._on_plain_trunk(seat)])

    def _on_plain_trunk(self, seat: Seat) -> bool:
        return self.rack.plain(seat.place) or self.rack.reads(seat.place)

    def _lane_key(self, seat: Seat, trunk: _Trunk | None) -> Hashable:
        return SHARED if trunk is not None and self.rack.plain(seat.place) else self.rack.lane(seat.place)

    def _lane(self, x: Tensor, rows: Sequence[tuple[int, Seat]], trunk: _Trunk | None) -> vit.Lane:
        """Rows with equal `Rack.lane`."""
        pictures, condition = [picture for picture, _ in rows], self.rack.gather([seat.place for _, seat in rows])
        if trunk is None or condition.reads_from is None:
            return vit.Lane.of(x[pictures], condition)
        return vit.Lane.reading(condition, trunk.reads(pictures))

    def _embed(self, pictures: Sequence[tuple[Pixels, Sequence[float], Sequence[float]]]) -> Tensor:
        """→ [n, N, D]. Raises ValueError for what `images` would not give, a picture of another size above all."""
        size = self.backbone.spec.image_size
        for pixels, _, _ in pictures:
            if not _whole(pixels, size):
                raise ValueError(f"expected uint8 [{size}, {size}, 3], got {pixels.dtype} {list(pixels.shape)}")
        sent = [at for at, (pixels, _, _) in enumerate(pictures) if pixels.dtype == np.float32]
        return vit.embed(self.backbone, self._mixed(pictures, sent) if sent else self._normalised(pictures))

    def _normalised(self, pictures: Sequence[tuple[Pixels, Sequence[float], Sequence[float]]]) -> Tensor:
        """uint8 crosses to the device; each picture is normalised there with its own mean and std. → [n, 3, S, S]"""
        device = self.backbone.device
        stack = torch.from_numpy(np.stack([pixels for pixels, _, _ in pictures])).to(device)
        mean = torch.tensor([mean for _, mean, _ in pictures], device=device)
        std = torch.tensor([std for _, _, std in pictures], device=device)
        return normalise(stack, mean, std, self.backbone.dtype)

    def _mixed(
        self, pictures: Sequence[tuple[Pixels, Sequence[float], Sequence[float]]], sent: Sequence[int]
    ) -> Tensor:
        """Those at `sent` came normalised and are only rounded to the backbone's dtype. → [n, 3, S, S]"""
        own = [at for at in range(len(pictures)) if at not in set(sent)]
        stack = torch.from_numpy(np.stack([pictures[at][0] for at in sent]))
        given = stack.to(self.backbone.device, self.backbone.dtype)
        x = given.new_empty(len(pictures), *given.shape[1:])
        x[list(sent)] = given
        if own:
            x[own] = self._normalised([pictures[at] for at in own])
        return x


def _whole(pixels: Pixels, size: int) -> bool:
    if pixels.dtype == np.float32:
        return pixels.shape == (3, size, size)
    return pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, S, S, 3], mean and std [B, 3] in units of full scale → [B, 3, S, S]. Computed in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    # in place and in the order of channels from the first step on: the same numbers in a tenth of the time
    x = pixels.permute(0, 3, 1, 2).to(wide, memory_format=torch.contiguous_format)
    return x.div_(255).sub_(mean.to(wide)[:, :, None, None]).div_(std.to(wide)[:, :, None, None]).to(dtype)


class _Trunk:
    """The plain trunk of pictures that readers read, a row each; head-only rows of these take its features.

    x: [n, N, D], embedded pictures; `pictures`: those among them that are wanted, as often as they are.
    """

    def __init__(self, backbone: Backbone, x: Tensor, pictures: Sequence[int]) -> None:
        self.row = {picture: row for row, picture in enumerate(dict.fromkeys(pictures))}
        self._passing = Passing(hidden_tokens(backbone.spec))
        self.lane = vit.Lane(x[list(self.row)], Plain(), None, passing=self._passing)

    def reads(self, pictures: Sequence[int]) -> Reads:
        """For readers of these pictures."""
        rows = np.array([self.row[picture] for picture in pictures])
        return Reads(self._passing, Pieces.of(rows, len(self.row), self.lane.x.device))


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
