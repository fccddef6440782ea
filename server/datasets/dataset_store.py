"""Datasets as files, for the server and its workers on one disk:

    datasets/<id>….json        the manifest, one for each owner: present means that the dataset is complete
    blobs/<ab>/<sha256>        the pictures as uploaded, each stored once for all datasets
    staging/<random>/          an ingest or a deletion in progress; what a dead process left is swept at the next start
    lock                       held while manifests and blobs change

Pictures are collected and verified in staging without the lock. Under the lock they are moved to `blobs`, and the
manifest is written last; deleting removes the manifest first. So readers need no lock and never see half a dataset.
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
from .dataset_builder import DatasetBuilder, Decode
from .disk import disk_errors, file_lock, flock, is_abandoned, sync, write
from .formats import manifests
from .formats.archive import Limits
from .formats.contents import contents
from .formats.image_kind import kind
from .formats.manifests import Manifests, id_of, no_dataset
from .formats.member_names import printable
from .lineage import drop_rare_labels, merge_examples, nothing_new

log = logging.getLogger(__name__)

MAX_NAME: Final = 200
MAX_FILE_BYTES: Final = 64 * 2**20
OTHER_FILES: Final = 1000  # members allowed beyond twice the most pictures: tables, notes, folders

GONE: Final = ".gone"  # of the manifest of a dataset that is being deleted
_NO_LINKS: Final = (
    errno.EPERM,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOTSUP,
)  # no hard links: some network and memory-card systems
_SHA256: Final = re.compile("[0-9a-f]{64}")

Datasets = list[Dataset]  # inside the class, `list` is a method
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
        with disk_errors():
            for folder in (self._manifests.folder, self._blobs, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def scoped(self, owner: str, quota: int | None = None, besides: Callable[[], int] = lambda: 0) -> DatasetStore:
        """A view of the datasets whose owner begins with `owner`. `quota` is the most bytes that these may have in
        all, together with what `besides` counts."""
        view = copy.copy(self)
        view._manifests = self._manifests.scoped(owner, quota, besides)
        return view

    def ingest(
        self,
        archive_path: Path,
        *,
        name: str = "",
        parent: str | None = None,
        label_column: str | None = None,
        progress: Progress | None = None,
    ) -> Dataset:
        """Store an uploaded archive as a dataset; with `parent`, together with that dataset's pictures. `label_column`
        chooses the labels' column of a parquet file or a table.

        Where the same content is stored already, that dataset is returned. Raises `BadRequest` bad_archive or
        bad_dataset, `NotFound` for the parent, `DiskFull`, `QueueFull` quota_exceeded; then nothing is kept.
        """
        base = None if parent is None else self.get(parent)
        with disk_errors(), self._staged() as staging, open(archive_path, "rb") as archive:
            limits = self._max_pixels, self._max_file_bytes, self._max_images
            builder = DatasetBuilder(staging, self._decode, *limits, label_column=label_column)
            for number, member in enumerate(contents(archive, self._limits, staging, label_column), start=1):
                builder.add(member)
                if progress is not None:
                    progress(number, builder.bytes_read)
            return self._keep(builder.build(name=_name(name, base), parent=base), staging)

    def extend(self, parent: str, more: Iterable[tuple[Example, Path]], *, name: str = "") -> Dataset:
        """A new dataset of the parent's pictures and `more`: verified pictures in files on the same disk.

        A new label with a single training picture is left out and listed as skipped. Files that are gone by now are
        ignored. Raises like `ingest`, and Conflict nothing_new where the parent has all of it, with what was left out.
        """
        base = self.get(parent)
        with disk_errors(), self._staged() as staging:
            linked = [
                _with_kind(example, staging / example.sha256)
                for example, path in more
                if _linked(path, staging / example.sha256)
            ]
            examples, skipped = drop_rare_labels(merge_examples(base.examples, linked, self._max_images), base.labels)
            dataset_name, now = _name(name, base), time.time()
            dataset = Dataset.of(examples, skipped, name=dataset_name, created_at=now, parent=base.id)
            if dataset.id == base.id:
                raise nothing_new(base.id, skipped)
            return self._keep(dataset, staging)

    def get(self, dataset_id: str) -> Dataset:
        """By its id, or by a unique prefix of it of four digits or more. Raises `NotFound`, `Unavailable`."""
        with disk_errors():
            dataset = manifests.read(self._manifests.find(dataset_id)[0])
        if dataset is None:
            raise no_dataset(dataset_id)
        return dataset

    def full_id(self, dataset_id: str) -> str:
        """The id of the dataset that `get` would return, without reading it."""
        with disk_errors():
            return id_of(self._manifests.find(dataset_id)[0])

    def list(self) -> Datasets:
        """Newest first. A dataset with a damaged manifest is logged and left out."""
        datasets: dict[str, Dataset] = {}
        for path in self._manifests.all():
            try:
                dataset = manifests.read(path) if id_of(path) not in datasets else None
            except Unavailable as error:
                log.error("a dataset is not listed: %s", error.detail)
            else:
                datasets |= {dataset.id: dataset} if dataset else {}
        return sorted(datasets.values(), key=lambda dataset: (dataset.created_at, dataset.id), reverse=True)

    def delete(self, dataset_id: str) -> None:
        """Delete the dataset, and its pictures that no other dataset (of any owner) uses."""
        with disk_errors(), self._locked():
            paths = self._manifests.find(dataset_id)
            dataset = manifests.read(paths[0])
            if dataset is None:
                raise no_dataset(dataset_id)
            gone = [path.with_suffix(GONE) for path in paths]
            for path, to in zip(paths, gone, strict=True):
                os.replace(path, to)  # needs no space on a full disk; a crash after it leaves a sign for `_sweep`
            sync(self._manifests.folder)
            self._remove({example.sha256 for example in dataset.examples} - self._used())
            for path in gone:
                path.unlink()

    def require_room(self, count: int) -> None:
        """Raise `QueueFull` quota_exceeded when `count` more bytes exceed the quota."""
        with disk_errors():
            self._manifests.require_room(count)

    def read(self, sha256: str) -> bytes:
        """A picture as it was uploaded, verified. Raises `NotFound` when its dataset has been deleted."""
        if not _SHA256.fullmatch(sha256):
            raise _no_picture(sha256)
        with disk_errors():
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
        """The digests of all pictures in use. Raises `Unavailable` when a manifest cannot be read."""
        datasets = [manifests.read(path) for path in Manifests(self._manifests.folder).all()]
        return {example.sha256 for dataset in datasets if dataset for example in dataset.examples}

    # --- changing -----------------------------------------------------------------------------------------------------

    def _keep(self, dataset: Dataset, staging: Path) -> Dataset:
        manifest, place = staging / "manifest", self._manifests.place(dataset.id)
        write(manifest, dataset.to_json().encode())
        with self._locked():
            known = manifests.read(place)
            if known is not None:  # what was left out is this upload's, not the earlier one's
                return replace(known, skipped=dataset.skipped, report=dataset.report)
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
        """Move the staged pictures to `blobs`; `moved` collects, as it goes, those that were not there before."""
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
        """One thread of one process at a time; the kernel releases the lock of a process that dies."""
        with file_lock(self._lock):
            yield

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A folder for one operation, removed at its end; its lock shows that the process is alive."""
        staging = self._staging / secrets.token_hex(8)
        with self._locked():  # no sweep may run between making and locking it
            staging.mkdir()
            alive = flock(staging, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield staging
        finally:
            shutil.rmtree(staging)
            os.close(alive)

    def _sweep(self) -> None:
        """Remove what dead processes left: their staging folders, and blobs that no dataset uses."""
        with self._locked():
            abandoned = [path for path in self._staging.iterdir() if is_abandoned(path)]
            gone = list(self._manifests.folder.glob(f"*{GONE}"))
            if not abandoned and not gone:
                return
            try:
                self._remove({path.name for path in self._blobs.glob("*/*")} - self._used())
            except Unavailable as error:
                log.error("pictures that no dataset uses are kept: %s", error.detail)
            for path in abandoned:
                shutil.rmtree(path)
            for path in gone:
                path.unlink()
        log.info("removed what %d interrupted ingests or deletions of datasets had left", len(abandoned) + len(gone))


def _name(name: str, parent: Dataset | None) -> str:
    """The name as one printable line, else the parent's."""
    clean = printable(" ".join(name.split()), MAX_NAME)
    return clean or (parent.name if parent else "")


def _linked(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where the file system has no links; False when the file is gone."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass  # staged already, for another split or label
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
    return NotFound(f"there is no picture {printable(sha256, 64)!r} in any dataset", code="dataset_not_found")
