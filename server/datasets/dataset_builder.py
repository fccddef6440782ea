"""Builds a dataset of one upload: pictures are verified, staged under their digest, and labelled at the end.

A picture's split and label come from its own row (a table file), else from the archive's manifest, else from its
folders. In a stream the manifest may come last, so no picture is labelled before the whole upload has been read.
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

from .dataset import Dataset, Example, Skipped, bad_dataset
from .disk import flush
from .example import Place, Split
from .formats import layout, manifest
from .formats.archive import Member, looks_like_archive
from .formats.image_kind import Kind, kind
from .formats.member_names import printable
from .lineage import merge_examples

MAX_SKIPPED: Final = 1000  # skipped files listed by name; the others are only counted
OTHER_TABLE: Final = (
    "not read: a table of labels is called labels.csv, metadata.csv or manifest.csv (or .jsonl, .parquet)"
)
MAX_TABLES: Final = 8  # files read as manifests: one for each split and its aliases

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
        name = printable("/".join(self.path), 1024)
        return Example(*place, name, self.sha256, self.bytes, *self.size, *self.kind)


class DatasetBuilder:
    """Collects the members of one upload in a staging folder; `build` makes the dataset of them."""

    def __init__(
        self,
        staging: Path,
        decode: Decode,
        max_pixels: int,
        max_file_bytes: int,
        max_images: int,
        *,
        label_column: str | None = None,
    ) -> None:
        self._staging, self._decode, self._max_pixels, self._label_column = staging, decode, max_pixels, label_column
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
            self._skip_unreadable(member, "an archive itself, which is not opened; expected pictures")
            return
        if len(data) > self._max_file_bytes:
            self._skip_unreadable(member, f"larger than {self._max_file_bytes:,} bytes")
            return
        try:
            size = self._decode(data, max_pixels=self._max_pixels).size
        except ServiceError as error:
            is_other_table = member.name.lower().endswith((".csv", ".tsv", ".jsonl"))
            self._skip_unreadable(member, OTHER_TABLE if is_other_table else error.detail)
            return
        if len(self._pictures) == self._max_images:
            raise bad_dataset(f"the archive has more than the {self._max_images:,} pictures allowed")
        sha256 = self._stage(data)
        self._pictures.append(_Picture(member.path, member.place, sha256, len(data), size, kind(data)))

    def build(self, *, name: str, parent: Dataset | None = None) -> Dataset:
        """The dataset; its pictures are durable in staging. Raises `BadRequest` bad_dataset."""
        examples: list[Example] = []
        for picture, place in zip(self._pictures, self._places(), strict=True):
            if isinstance(place, str):
                self._skip("/".join(picture.path), place)
            else:
                examples.append(picture.example(place))
        if self._not_listed:
            self._skipped.append(Skipped("…", f"and {self._not_listed:,} more files"))
        flush([self._staging / sha256 for sha256 in {e.sha256 for e in examples}])
        if parent is not None:
            examples = merge_examples(parent.examples, examples, self._max_images)
        parent_id = parent.id if parent else None
        return Dataset.of(examples, self._skipped, name=name, created_at=time.time(), parent=parent_id)

    # --- placing ------------------------------------------------------------------------------------------------------

    def _places(self) -> list[Place]:
        """The place of each picture: its row's, else what the manifest or the folders say."""
        by_path = iter(self._places_by_path([picture.path for picture in self._pictures if picture.place is None]))
        return [next(by_path) if picture.place is None else picture.place for picture in self._pictures]

    def _places_by_path(self, paths: Sequence[tuple[str, ...]]) -> list[Place]:
        used = manifest.labelling_tables(self._tables, paths) if paths else []
        for path in self._tables.keys() - set(used):
            self._skip("/".join(path), "a table of labels that is not beside the pictures")
        if not used and self._label_column is not None and len(paths) == len(self._pictures):
            column = printable(self._label_column, 60)
            raise bad_dataset(f"expected a table or a parquet file with the column {column!r}, found neither")
        if not used:
            return layout.places(paths)
        tables = [self._table(path) for path in used]
        places, unmatched = manifest.places(tables, paths, self._unreadable)
        for skipped in unmatched:
            self._skip(skipped.name, skipped.reason)
        return places

    def _table(self, path: tuple[str, ...]) -> manifest.Table:
        data = self._tables[path]
        if len(data) > self._max_file_bytes:
            raise bad_dataset(f"{printable('/'.join(path))} is larger than {self._max_file_bytes:,} bytes")
        return manifest.read(path, data, max_rows=2 * self._max_images, label_column=self._label_column)

    # --- staging and skipping -----------------------------------------------------------------------------------------

    def _stage(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._staging / sha256
        if not path.exists():
            path.write_bytes(data)
        return sha256

    def _skip_unreadable(self, member: Member, reason: str) -> None:
        self._unreadable.add(member.path)
        self._skip(member.name, reason)

    def _skip(self, name: str, reason: str) -> None:
        if len(self._skipped) < MAX_SKIPPED:
            self._skipped.append(Skipped(printable(name), reason))
        else:
            self._not_listed += 1
