"""Where the manifests of data sets lie, and whose they are.

    <id>.json             stored by who may see everything
    <id>@<owner>.json     stored by an owner, with the owner's own words: the same pictures may be several owners'

A view of an owner finds the manifests of all owners that begin with it, and nothing of the others'.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from server.datasets.dataset import Dataset
from server.errors import NotFound, QueueFull, Unavailable

from .member_names import shown

QUOTA_S: Final = 3600.0  # when to try again: somebody has to delete something first

_ID: Final = re.compile("[0-9a-f]{8,64}")

Paths = list[Path]


class Manifests:
    """Those in `folder` that `owner` may see. `quota` is the most bytes that their data sets may have in all."""

    def __init__(self, folder: Path, owner: str = "", quota: int | None = None) -> None:
        self.folder, self._owner, self._quota = folder, owner, quota
        self._bytes: dict[str, int] = {}  # by file: they never change

    def of(self, owner: str, quota: int | None) -> Manifests:
        return Manifests(self.folder, owner, quota)

    def place(self, dataset_id: str) -> Path:
        """Where this owner's manifest belongs."""
        return self.folder / (f"{dataset_id}@{self._owner}.json" if self._owner else f"{dataset_id}.json")

    def found(self, dataset_id: str) -> Paths:
        """One data set's, the owner's own first, by its id or by its first digits, eight or more, when these are only
        its own. Raises `NotFound`."""
        paths = self._seen(f"{dataset_id}*") if _ID.fullmatch(dataset_id) else []
        ids = {id_of(path) for path in paths}
        if len(ids) > 1:
            detail = f"{len(ids)} datasets begin with {dataset_id}: give more digits"
            raise NotFound(detail, code="dataset_not_found")
        if not paths:
            raise no_dataset(dataset_id)
        return paths

    def all(self) -> Paths:
        return self._seen("*")

    def require_room(self, count: int) -> None:
        """Raises `QueueFull` quota_exceeded when so many bytes more would be too many."""
        if self._quota is None or (used := sum(map(self._size, self.all()))) + count <= self._quota:
            return
        detail = f"this key may store {self._quota} bytes of datasets; with {used} there, {count} more are too many"
        raise QueueFull(detail, code="quota_exceeded", retry_after_s=QUOTA_S)

    def _seen(self, pattern: str) -> Paths:
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
    """None where there is none. Raises `Unavailable` for one that is damaged."""
    try:
        return Dataset.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        detail = f"the manifest of dataset {id_of(path)[:12]} is damaged on the server's disk"
        raise Unavailable(detail, code="store_unavailable") from error


def no_dataset(dataset_id: str) -> NotFound:
    return NotFound(f"there is no dataset {shown(dataset_id, 64)!r}", code="dataset_not_found")
