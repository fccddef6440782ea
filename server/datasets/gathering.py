"""The pictures of one upload on their way into a dataset: verified, staged by content, and placed at the end.

A picture says itself where it belongs (a row of a table file), or the archive's manifest does, or else its folders do.
In a stream the manifest may come last, so nothing is placed before everything is there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from server.errors import ServiceError

from .dataset import Dataset, Example, Skipped, bad
from .disk import flush
from .example import Place, Split
from .formats import layout, manifest
from .formats.archive import Member, looks_like_archive
from .formats.image_kind import Kind, kind
from .formats.member_names import shown
from .formats.metering import refused
from .lineage import joined

MAX_SKIPPED: Final = 1000  # of the files that were skipped, as many are listed by name
MAX_TABLES: Final = 8  # files that may be a manifest: one for each split and its aliases

Decode = Callable[..., Image.Image]  # (data, *, max_pixels); raises ServiceError


@dataclass(frozen=True, slots=True)
class _Picture:
    path: tuple[str, ...]
    place: Place | None
    sha256: str
    bytes: int
    size: tuple[int, int]
    kind: Kind

    def example(self, place: tuple[Split, str]) -> Example:
        name = shown("/".join(self.path), 1024)
        return Example(*place, name, self.sha256, self.bytes, *self.size, *self.kind)


class Gathered:
    """The pictures of one upload on their way into staging."""

    def __init__(self, staging: Path, decode: Decode, max_pixels: int, max_file_bytes: int, max_images: int) -> None:
        self._staging, self._decode, self._max_pixels = staging, decode, max_pixels
        self._max_file_bytes, self._max_images = max_file_bytes, max_images
        self._pictures: list[_Picture] = []
        self._tables: dict[tuple[str, ...], bytes] = {}
        self._unreadable: set[tuple[str, ...]] = set()
        self._skipped: list[Skipped] = []
        self._not_listed = 0
        self.bytes_read = 0

    def add(self, member: Member | Skipped) -> None:
        if isinstance(member, Skipped):
            self._skip(member.name, member.reason)
            return
        data = member.read(self._max_file_bytes)
        self.bytes_read += len(data)
        if manifest.is_table(member.path) and len(self._tables) < MAX_TABLES:
            self._tables[member.path] = data
        else:
            self._add_picture(member, data)

    def _add_picture(self, member: Member, data: bytes) -> None:
        if looks_like_archive(member.name, data):
            raise refused(f"the archive's member {shown(member.name)!r} is an archive itself; expected pictures")
        if len(data) > self._max_file_bytes:
            self._leave(member, f"larger than {self._max_file_bytes:,} bytes")
            return
        try:
            size = self._decode(data, max_pixels=self._max_pixels).size
        except ServiceError as error:
            self._leave(member, error.detail)
            return
        if len(self._pictures) == self._max_images:
            raise bad(f"the archive has more than the {self._max_images:,} pictures allowed")
        sha256 = self._stage(data)
        self._pictures.append(_Picture(member.path, member.place, sha256, len(data), size, kind(data)))

    def dataset(self, *, name: str, parent: Dataset | None = None) -> Dataset:
        """Every picture that it names is durable in staging."""
        examples: list[Example] = []
        for picture, place in zip(self._pictures, self._places(), strict=True):
            if isinstance(place, str):
                self._skip("/".join(picture.path), place)
            else:
                examples.append(picture.example(place))
        if self._not_listed:
            self._skipped.append(Skipped("…", f"and {self._not_listed:,} more files"))
        flush([self._staging / sha256 for sha256 in {one.sha256 for one in examples}])
        if parent is not None:
            examples = joined(parent.examples, examples, self._max_images)
        origin = parent.id if parent else None
        return Dataset.of(examples, self._skipped, name=name, created_at=time.time(), parent=origin)

    # --- placing ------------------------------------------------------------------------------------------------------

    def _places(self) -> list[Place]:
        """The place of each picture: its own, or what is told of all those that have none."""
        told = iter(self._told([one.path for one in self._pictures if one.place is None]))
        return [next(told) if one.place is None else one.place for one in self._pictures]

    def _told(self, paths: Sequence[tuple[str, ...]]) -> list[Place]:
        counting = manifest.tables_that_count(self._tables, paths) if paths else []
        for path in self._tables.keys() - set(counting):
            self._skip("/".join(path), "a table that is not beside the pictures")
        if not counting:
            return layout.places(paths)
        tables = [self._table(path) for path in counting]
        places, lost = manifest.places(tables, paths, self._unreadable)
        for each in lost:
            self._skip(each.name, each.reason)
        return places

    def _table(self, path: tuple[str, ...]) -> manifest.Table:
        data = self._tables[path]
        if len(data) > self._max_file_bytes:
            raise bad(f"{shown('/'.join(path))} is larger than {self._max_file_bytes:,} bytes")
        return manifest.read(path, data, max_rows=2 * self._max_images)

    # --- staging and skipping -----------------------------------------------------------------------------------------

    def _stage(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._staging / sha256
        if not path.exists():
            path.write_bytes(data)
        return sha256

    def _leave(self, member: Member, reason: str) -> None:
        self._unreadable.add(member.path)
        self._skip(member.name, reason)

    def _skip(self, name: str, reason: str) -> None:
        if len(self._skipped) < MAX_SKIPPED:
            self._skipped.append(Skipped(shown(name), reason))
        else:
            self._not_listed += 1
