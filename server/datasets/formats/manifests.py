"""The manifest files of datasets, and their owners.

    <id>.json             stored without an owner
    <id>@<owner>.json     stored by an owner, under the owner's name for it: several owners may store the same pictures

The view of an owner contains the manifests of all owners that begin with it, and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from server.datasets.dataset import Dataset
from server.errors import NotFound, QueueFull, Unavailable

from .member_names import printable

QUOTA_S: Final = 3600.0  # Retry-After: datasets have to be deleted first

_ID: Final = re.compile("[0-9a-f]{4,64}")

Paths = list[Path]


class Manifests:
    """The manifests in `folder` that `owner` may see. `quota`: the most bytes that their datasets may have in all,
    together with the bytes that `besides` returns."""

    def __init__(
        self, folder: Path, owner: str = "", quota: int | None = None, besides: Callable[[], int] = lambda: 0
    ) -> None:
        self.folder, self._owner, self._quota, self._besides = folder, owner, quota, besides
        self._bytes: dict[str, int] = {}  # by file name; manifests never change

    def scoped(self, owner: str, quota: int | None, besides: Callable[[], int]) -> Manifests:
        return Manifests(self.folder, owner, quota, besides)

    def place(self, dataset_id: str) -> Path:
        """The path of this owner's manifest of a dataset."""
        return self.folder / (f"{dataset_id}@{self._owner}.json" if self._owner else f"{dataset_id}.json")

    def find(self, dataset_id: str) -> Paths:
        """The manifests of one dataset, the owner's first, by its id or by a unique prefix of it of four digits or
        more. Raises `NotFound`."""
        paths = self._visible(f"{dataset_id}*") if _ID.fullmatch(dataset_id) else []
        ids = {id_of(path) for path in paths}
        if len(ids) > 1:
            detail = f"{len(ids)} datasets begin with {dataset_id}; give more digits"
            raise NotFound(detail, code="dataset_not_found")
        if not paths:
            raise no_dataset(dataset_id)
        return paths

    def all(self) -> Paths:
        return self._visible("*")

    def require_room(self, count: int) -> None:
        """Raise `QueueFull` quota_exceeded when `count` more bytes exceed the quota."""
        if self._quota is None:
            return
        used = sum(map(self._size, self.all())) + self._besides()
        if used + count <= self._quota:
            return
        stored = f"{self._quota} bytes of data sets, unfinished uploads and feedback"
        detail = f"this key may store {stored}; it has {used}, and this needs {count} more"
        raise QueueFull(detail, code="quota_exceeded", retry_after_s=QUOTA_S)

    def _visible(self, pattern: str) -> Paths:
        paths = self.folder.glob(f"{pattern}.json")
        return sorted(path for path in paths if _owner_of(path).startswith(self._owner))

    def _size(self, path: Path) -> int:
        if path.name not in self._bytes:
            dataset = read(path)
            self._bytes[path.name] = dataset.bytes if dataset else 0
        return self._bytes[path.name]


def id_of(path: Path) -> str:
    return path.stem.partition("@")[0]


def _owner_of(path: Path) -> str:
    return path.name.removesuffix(".json").partition("@")[2]


def read(path: Path) -> Dataset | None:
    """The dataset of a manifest; None where there is no such file. Raises `Unavailable` for a damaged one."""
    try:
        return Dataset.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        detail = f"the manifest of dataset {id_of(path)[:12]} is damaged on the server's disk"
        raise Unavailable(detail, code="store_unavailable") from error


def no_dataset(dataset_id: str) -> NotFound:
    return NotFound(f"there is no dataset {printable(dataset_id, 64)!r}", code="dataset_not_found")
