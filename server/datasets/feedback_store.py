"""User feedback: pictures with the labels that a task should have answered, a folder for each task.

    <task>/words               the log of labels, see `feedback_log`; a picture that it names is there
    <task>/pictures/<sha256>   the pictures as uploaded
    lock                       held while anything changes

A picture is stored before its log entry is written, and both are on the disk before `add` returns. What a dead process
left beyond that is swept at the next start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.engine.images import decode
from server.errors import Conflict, NotFound, ServiceError, Unavailable

from .dataset import Example
from .disk import FULL, disk_errors, file_lock, sync, write
from .formats.feedback_log import FeedbackEntry, FeedbackLog, FeedbackLogFile
from .formats.member_names import printable

log = logging.getLogger(__name__)

_GONE: Final = ".gone-"  # not a task: no task's name begins with a dot
_NEW: Final = ".new"


@dataclass(frozen=True, slots=True)
class Added:
    """The entry of one picture. `previous` is the label that it had before; None for a new picture."""

    entry: FeedbackEntry
    previous: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """Some entries, newest first; `next` is the `before` of the following page. `counts`: all pictures, by label."""

    counts: Mapping[str, int]
    entries: Sequence[FeedbackEntry]
    next: int | None


class FeedbackStore:
    """The feedback below `root`, which is made when absent. Safe for threads and processes."""

    def __init__(
        self, root: Path, *, max_images: int, max_image_pixels: int, decode: Callable[..., Any] = decode.decode
    ) -> None:
        self._root, self._lock = root, root / "lock"
        self._max_images, self._max_pixels, self._decode = max_images, max_image_pixels, decode
        self._files: dict[str, FeedbackLogFile] = {}
        with disk_errors():
            root.mkdir(parents=True, exist_ok=True)
            with file_lock(self._lock):
                for path in [path for path in root.iterdir() if path.is_dir()]:
                    self._sweep(path)

    def add(self, task: str, pictures: Sequence[bytes], label: str) -> list[Added]:
        """Store pictures with their right label, or relabel them; on the disk on return.

        Repeating the same label changes nothing. Raises what decoding raises, before any picture is stored; Conflict
        feedback_full and DiskFull, after the pictures before the failing one have been stored.
        """
        sizes = [self._size(data, at, len(pictures)) for at, data in enumerate(pictures)]
        with disk_errors(), file_lock(self._lock):
            return [self._add(task, data, label, size) for data, size in zip(pictures, sizes, strict=True)]

    def stored_bytes(self, tenant: str) -> int:
        """The bytes of all pictures of the tasks whose names begin with `tenant`."""
        with disk_errors():
            tasks = [path.name for path in self._root.iterdir() if path.is_dir() and path.name.startswith(tenant)]
        return sum(entry.bytes for task in tasks for entry in self._read(task).last.values())

    def page(self, task: str, *, label: str | None = None, before: int | None = None, limit: int = 50) -> Page:
        """`label` filters the entries, not the counts; `before` is an earlier page's `next`."""
        entries = self._read(task).newest_first()
        counts = dict(Counter(entry.label for entry in entries).most_common())
        matching = [
            entry for entry in entries if label in (None, entry.label) and (before is None or entry.seq < before)
        ]
        return Page(counts, matching[:limit], matching[limit - 1].seq if len(matching) > limit else None)

    def examples(self, task: str) -> list[tuple[Example, Path]]:
        """All pictures as training examples with the paths of their files, oldest first."""
        return [
            (_example(entry), self._picture(task, entry.sha256)) for entry in reversed(self._read(task).newest_first())
        ]

    def delete(self, task: str, sha256: str) -> None:
        """Remove a picture and its label. Raises NotFound feedback_not_found."""
        with disk_errors(), file_lock(self._lock):
            feedback = self._file(task).read()
            if sha256 not in feedback.last:
                raise no_feedback(task, sha256)
            removal = FeedbackEntry(feedback.next_seq, sha256, "")
            try:
                self._file(task).append(removal)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._picture(task, sha256).unlink(missing_ok=True)  # first, for the space that the entry needs
                self._file(task).append(removal)
            self._picture(task, sha256).unlink(missing_ok=True)

    def delete_task(self, task: str) -> None:
        """Remove all of a task's feedback, if there is any."""
        with disk_errors(), file_lock(self._lock):
            trash = self._root / f"{_GONE}{secrets.token_hex(8)}"
            try:
                os.replace(self._root / task, trash)
            except FileNotFoundError:
                return
            sync(self._root)
            shutil.rmtree(trash)

    # --- entries ------------------------------------------------------------------------------------------------------

    def _add(self, task: str, data: bytes, label: str, size: tuple[int, int]) -> Added:
        sha256 = hashlib.sha256(data).hexdigest()
        feedback = self._file(task).read()
        previous = feedback.last.get(sha256)
        if previous is not None and previous.label == label:
            return Added(previous, label)
        if previous is None and len(feedback.last) >= self._max_images:
            detail = f"task {task!r} has {len(feedback.last)} images of feedback, the most that are kept"
            raise Conflict(detail, code="feedback_full")
        self._keep_picture(task, sha256, data)
        entry = FeedbackEntry(feedback.next_seq, sha256, label, len(data), *size, time.time())
        self._file(task).append(entry)
        return Added(entry, previous.label if previous else None)

    def _size(self, data: bytes, at: int, count: int) -> tuple[int, int]:
        """Width and height in pixels, by decoding the picture. Raises ServiceError that says which image it is."""
        try:
            width, height = self._decode(data, max_pixels=self._max_pixels).size
        except ServiceError as error:
            if count > 1:
                error.detail = f"image {at}: {error.detail}"
                error.args = (error.detail,)
                error.extra["image"] = at
            raise
        return width, height

    # --- files --------------------------------------------------------------------------------------------------------

    def _file(self, task: str) -> FeedbackLogFile:
        return self._files.setdefault(task, FeedbackLogFile(self._root / task / "words"))

    def _read(self, task: str) -> FeedbackLog:
        with disk_errors():
            return self._file(task).read()

    def _picture(self, task: str, sha256: str) -> Path:
        return self._root / task / "pictures" / sha256

    def _keep_picture(self, task: str, sha256: str, data: bytes) -> None:
        """The caller holds the lock, so an incomplete file is a dead process's."""
        path = self._picture(task, sha256)
        if path.exists():
            return
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            sync(self._root)
            sync(self._root / task)
        new = path.with_name(sha256 + _NEW)
        new.unlink(missing_ok=True)
        try:
            write(new, data)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync(path.parent)

    def _sweep(self, folder: Path) -> None:
        """Remove pictures without an entry, and tasks whose deletion was interrupted."""
        if folder.name.startswith(_GONE):
            shutil.rmtree(folder)
            return
        try:
            entries = self._file(folder.name).read().last
        except Unavailable as error:
            log.error("pictures of %s are kept: %s", folder.name, error.detail)
            return
        for path in (folder / "pictures").glob("*"):
            if path.name not in entries:
                path.unlink()


def _example(entry: FeedbackEntry) -> Example:
    name = f"feedback/{entry.sha256[:12]}"
    return Example("train", entry.label, name, entry.sha256, entry.bytes, entry.width, entry.height)


def no_feedback(task: str, sha256: str) -> NotFound:
    return NotFound(f"task {task!r} has no feedback {printable(sha256, 64)!r}", code="feedback_not_found")
