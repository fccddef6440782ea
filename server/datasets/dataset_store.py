"""Datasets as files, for the server and its workers on one disk:

    datasets/<id>….json        the manifest, one of each owner: present means that the dataset is whole
    blobs/<ab>/<sha256>        the pictures as they were uploaded, each once, whoever uses it
    staging/<random>/          an ingest or a deletion under way; what a dead process left is swept at the next start
    lock                       held while manifests and blobs change

Pictures are gathered and verified in staging without the lock; under it they are moved to their places and the manifest
is written last. Deleting takes the manifest away first. So a reader, who needs no lock, never meets half a dataset.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from server.engine.images import decode
from server.errors import NotFound, Unavailable

from .dataset import Dataset, Example
from .disk import disk, flock, flocked, is_abandoned, sync, write
from .formats import manifests
from .formats.archive import Limits
from .formats.contents import contents
from .formats.image_kind import kind
from .formats.manifests import Manifests, id_of, no_dataset
from .formats.member_names import shown
from .gathering import Decode, Gathered
from .lineage import joined, without_lone

log = logging.getLogger(__name__)

MAX_NAME: Final = 200
MAX_FILE_BYTES: Final = 64 * 2**20
OTHER_FILES: Final = 1000  # members that are no pictures, beside as many as there may be pictures

_NO_LINKS: Final = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP)  # some network and memory-card systems
_SHA256: Final = re.compile("[0-9a-f]{64}")

Datasets = list[Dataset]  # inside the store `list` is a verb
Progress = Callable[[int, int], None]  # files and bytes read so far


class DatasetStore:
    """The datasets below `root`, which is made when absent. Safe for threads and processes."""

    def __init__(
        self,
        root: Path,
        *,
        max_images: int,
        max_unpacked_bytes: int,
        max_image_pixels: int,
        max_file_bytes: int = MAX_FILE_BYTES,
        decode: Decode = decode.decode,
    ) -> None:
        self._manifests = Manifests(root / "datasets")
        self._blobs, self._staging = root / "blobs", root / "staging"
        self._lock = root / "lock"
        self._max_images, self._max_pixels, self._max_file_bytes = max_images, max_image_pixels, max_file_bytes
        self._limits = Limits(max_members=2 * max_images + OTHER_FILES, max_unpacked_bytes=max_unpacked_bytes)
        self._decode = decode
        with disk():
            for folder in (self._manifests.folder, self._blobs, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def of(self, owner: str, quota: int | None = None) -> DatasetStore:
        """The same store as who stores under this prefix is to have it: only the data sets of owners that begin with
        it, as these call them. `quota` is the most bytes that they may have in all."""
        own = copy.copy(self)
        own._manifests = self._manifests.of(owner, quota)
        return own

    def ingest(
        self, archive_path: Path, *, name: str = "", parent: str | None = None, progress: Progress | None = None
    ) -> Dataset:
        """Store an archive of class folders, with `parent` together with that dataset's pictures.

        Content that is here already is the dataset that is here. Raises `BadRequest` bad_archive or bad_dataset,
        `NotFound` for the parent, `DiskFull`, `QueueFull` quota_exceeded; then nothing is left of it.
        """
        base = None if parent is None else self.get(parent)
        with disk(), self._staged() as staging, open(archive_path, "rb") as archive:
            gathered = Gathered(staging, self._decode, self._max_pixels, self._max_file_bytes, self._max_images)
            for number, member in enumerate(contents(archive, self._limits, staging), start=1):
                gathered.add(member)
                if progress is not None:
                    progress(number, gathered.bytes_read)
            return self._keep(gathered.dataset(name=_called(name, base), parent=base), staging)

    def extended(self, parent: str, more: Iterable[tuple[Example, Path]], *, name: str = "") -> Dataset:
        """The pictures of a dataset and verified ones in files of their own on the same disk, as a new dataset.

        A label that is new needs two pictures; one alone is left out and listed. A file that is gone by now is not
        missed. Raises like `ingest`.
        """
        base = self.get(parent)
        with disk(), self._staged() as staging:
            linked = [
                _with_kind(example, staging / example.sha256)
                for example, path in more
                if _linked(path, staging / example.sha256)
            ]
            examples, skipped = without_lone(joined(base.examples, linked, self._max_images), base.labels)
            named, now = _called(name, base), time.time()
            dataset = Dataset.of(examples, skipped, name=named, created_at=now, parent=base.id)
            return self._keep(dataset, staging)

    def get(self, dataset_id: str) -> Dataset:
        """By its id, or by its first digits, eight or more, when these are only its own."""
        with disk():
            dataset = manifests.read(self._manifests.found(dataset_id)[0])
        if dataset is None:
            raise no_dataset(dataset_id)
        return dataset

    def whole_id(self, dataset_id: str) -> str:
        """What `get` would find, without reading it."""
        with disk():
            return id_of(self._manifests.found(dataset_id)[0])

    def list(self) -> Datasets:
        """Newest first. One with a damaged manifest is told to the log and not listed."""
        found: dict[str, Dataset] = {}
        for path in self._manifests.all():
            try:
                dataset = manifests.read(path) if id_of(path) not in found else None
            except Unavailable as error:
                log.error("a dataset is not listed: %s", error.detail)
            else:
                found |= {dataset.id: dataset} if dataset else {}
        return sorted(found.values(), key=lambda each: (each.created_at, each.id), reverse=True)

    def delete(self, dataset_id: str) -> None:
        """With the pictures that no other dataset uses, and no other owner of this one."""
        with disk(), self._staged() as staging, self._locked():
            paths = self._manifests.found(dataset_id)
            dataset = manifests.read(paths[0])
            if dataset is None:
                raise no_dataset(dataset_id)
            for path in paths:
                os.replace(path, staging / path.name)
            sync(self._manifests.folder)
            self._remove({example.sha256 for example in dataset.examples} - self._used())

    def require_room(self, count: int) -> None:
        """For `count` bytes more. Raises `QueueFull` quota_exceeded."""
        with disk():
            self._manifests.require_room(count)

    def read(self, sha256: str) -> bytes:
        """A picture as it was uploaded, verified. `NotFound` when its dataset has been deleted."""
        if not _SHA256.fullmatch(sha256):
            raise _no_picture(sha256)
        with disk():
            try:
                data = self._blob(sha256).read_bytes()
            except FileNotFoundError:
                raise _no_picture(sha256) from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Unavailable(f"picture {sha256[:12]} is damaged on the server's disk", code="store_unavailable")
        return data

    # --- finding ------------------------------------------------------------------------------------------------------

    def _blob(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256

    def _used(self) -> set[str]:
        """The blobs of all datasets; refuses to guess when a manifest cannot be read."""
        found = [manifests.read(path) for path in Manifests(self._manifests.folder).all()]
        return {example.sha256 for dataset in found if dataset for example in dataset.examples}

    # --- changing -----------------------------------------------------------------------------------------------------

    def _keep(self, dataset: Dataset, staging: Path) -> Dataset:
        manifest, place = staging / "manifest", self._manifests.place(dataset.id)
        write(manifest, dataset.to_json().encode())
        with self._locked():
            known = manifests.read(place)
            if known is not None:
                return known
            self._manifests.require_room(dataset.bytes)
            moved: set[str] = set()
            try:
                self._move_in(staging, dataset, moved)
                os.replace(manifest, place)
            except BaseException:
                self._remove(moved)
                raise
            sync(self._manifests.folder)
        return dataset

    def _move_in(self, staging: Path, dataset: Dataset, moved: set[str]) -> None:
        """`moved` tells, at any time, which blobs were not there before."""
        for sha256 in {example.sha256 for example in dataset.examples}:
            blob = self._blob(sha256)
            if not blob.exists():
                if not (staging / sha256).exists():
                    raise NotFound("the parent was deleted while pictures were added", code="dataset_not_found")
                blob.parent.mkdir(exist_ok=True)
                moved.add(sha256)
                os.replace(staging / sha256, blob)
        for folder in {self._blob(sha256).parent for sha256 in moved}:
            sync(folder)
        sync(self._blobs)

    def _remove(self, blobs: Collection[str]) -> None:
        for sha256 in blobs:
            self._blob(sha256).unlink(missing_ok=True)
        for folder in {self._blob(sha256).parent for sha256 in blobs}:
            with suppress(OSError):  # not empty: other datasets' blobs are there
                folder.rmdir()

    # --- staging and the lock -----------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread of one process at a time; the kernel lets go for a process that dies."""
        with flocked(self._lock):
            yield

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A folder of one's own, locked to show that its owner lives, gone at the end."""
        staging = self._staging / secrets.token_hex(8)
        with self._locked():  # between making and locking it no sweeper may come
            staging.mkdir()
            alive = flock(staging, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield staging
        finally:
            shutil.rmtree(staging)
            os.close(alive)

    def _sweep(self) -> None:
        """What the dead left in staging, and blobs that they had moved in or not yet removed."""
        with self._locked():
            dead = [path for path in self._staging.iterdir() if is_abandoned(path)]
            if not dead:
                return
            try:
                self._remove({path.name for path in self._blobs.glob("*/*")} - self._used())
            except Unavailable as error:
                log.error("pictures that no dataset uses are kept: %s", error.detail)
            for path in dead:
                shutil.rmtree(path)
        log.info("swept what %d interrupted ingests or deletions of datasets had left", len(dead))


def _called(name: str, parent: Dataset | None) -> str:
    printable = shown(" ".join(name.split()), MAX_NAME)
    return printable or (parent.name if parent else "")


def _linked(source: Path, target: Path) -> bool:
    """A second name for a file, which costs no bytes, or a copy where there are none; False when the file is gone."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass  # said of two splits or labels: staged already
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        write(target, source.read_bytes())
    return True


def _with_kind(example: Example, path: Path) -> Example:
    format_, mode = kind(path.read_bytes())
    return replace(example, format=format_, mode=mode)


def _no_picture(sha256: str) -> NotFound:
    return NotFound(f"there is no picture {shown(sha256, 64)!r} in any dataset", code="dataset_not_found")
