"""The pictures of one archive on their way into a dataset: verified, staged by content, placed by their folders."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from PIL import Image

from server.datasets.archive import Member, sniff
from server.datasets.dataset import Dataset, Example, Skipped, bad
from server.datasets.disk import write
from server.datasets.layout import places
from server.datasets.lineage import joined
from server.datasets.member_names import shown
from server.errors import ServiceError

MAX_SKIPPED: Final = 1000  # of the files that were skipped, as many are listed by name

Decode = Callable[..., Image.Image]  # (data, *, max_pixels); raises ServiceError


class Gathered:
    """The pictures of one archive on their way into staging."""

    def __init__(self, staging: Path, decode: Decode, max_pixels: int, max_file_bytes: int, max_images: int) -> None:
        self._staging, self._decode, self._max_pixels = staging, decode, max_pixels
        self._max_file_bytes, self._max_images = max_file_bytes, max_images
        self._pictures: list[tuple[tuple[str, ...], str, int, tuple[int, int]]] = []  # path, sha256, bytes, size
        self._skipped: list[Skipped] = []
        self._not_listed = 0
        self.bytes_read = 0

    def add(self, member: Member) -> None:
        data = member.read(self._max_file_bytes)
        self.bytes_read += len(data)
        if len(data) > self._max_file_bytes:
            self._skip(member.name, f"larger than {self._max_file_bytes:,} bytes")
            return
        try:
            size = self._decode(data, max_pixels=self._max_pixels).size
        except ServiceError as error:
            self._skip(member.name, "an archive inside the archive" if sniff(data[:512]) else error.detail)
            return
        if len(self._pictures) == self._max_images:
            raise bad(f"the archive has more than the {self._max_images:,} pictures allowed")
        self._pictures.append((member.path, self._stage(data), len(data), size))

    def dataset(self, *, name: str, parent: Dataset | None = None) -> Dataset:
        examples: list[Example] = []
        found = places([path for path, *_ in self._pictures])
        for (path, sha256, size, (width, height)), place in zip(self._pictures, found, strict=True):
            if isinstance(place, str):
                self._skip("/".join(path), place)
            else:
                split, label = place
                examples.append(Example(split, label, shown("/".join(path), 1024), sha256, size, width, height))
        if self._not_listed:
            self._skipped.append(Skipped("…", f"and {self._not_listed:,} more files"))
        if parent is not None:
            examples = joined(parent.examples, examples, self._max_images)
        origin = parent.id if parent else None
        return Dataset.of(examples, self._skipped, name=name, created_at=time.time(), parent=origin)

    def _stage(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._staging / sha256
        if not path.exists():
            write(path, data)
        return sha256

    def _skip(self, name: str, reason: str) -> None:
        if len(self._skipped) < MAX_SKIPPED:
            self._skipped.append(Skipped(shown(name), reason))
        else:
            self._not_listed += 1
