"""What people say that a task should have answered: pictures with their right labels, a folder for each task.

    <task>/words               what was said, see `words`; present with a line about a picture: it is there
    <task>/pictures/<sha256>   the pictures as they came
    lock                       held while any of it changes

A picture is in its place before the word about it is written, and both are on the disk before `add` returns. What a
dead process left besides is swept at the next start.
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
from .disk import disk, flocked, sync, write
from .formats.member_names import shown
from .formats.words import Word, WordFile, Words

log = logging.getLogger(__name__)

_GONE: Final = ".gone-"  # no task's name begins with a dot
_NEW: Final = ".new"


@dataclass(frozen=True, slots=True)
class Added:
    """`previous` is the label that the picture had before; None for a new one."""

    word: Word
    previous: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """Some words, newest first; `next` is where the following page begins. `counts` are of all, by label."""

    counts: Mapping[str, int]
    words: Sequence[Word]
    next: int | None


class FeedbackStore:
    """The feedback below `root`, which is made when absent. Safe for threads and processes."""

    def __init__(
        self, root: Path, *, max_images: int, max_image_pixels: int, decode: Callable[..., Any] = decode.decode
    ) -> None:
        self._root, self._lock = root, root / "lock"
        self._max_images, self._max_pixels, self._decode = max_images, max_image_pixels, decode
        self._files: dict[str, WordFile] = {}
        with disk():
            root.mkdir(parents=True, exist_ok=True)
            with flocked(self._lock):
                for path in [path for path in root.iterdir() if path.is_dir()]:
                    self._sweep(path)

    def add(self, task: str, pictures: Sequence[bytes], label: str) -> list[Added]:
        """Store pictures under their right label, or give them another; on the disk on return.

        The same said again changes nothing. Raises what decoding raises, before any is stored; Conflict feedback_full,
        DiskFull, and then those before it are stored.
        """
        sizes = [self._size(data, at, len(pictures)) for at, data in enumerate(pictures)]
        with disk(), flocked(self._lock):
            return [self._add(task, data, label, size) for data, size in zip(pictures, sizes, strict=True)]

    def page(self, task: str, *, label: str | None = None, before: int | None = None, limit: int = 50) -> Page:
        """`label` narrows the words, not the counts; `before` is an earlier page's `next`."""
        words = self._read(task).newest_first()
        counts = dict(Counter(word.label for word in words).most_common())
        found = [one for one in words if label in (None, one.label) and (before is None or one.seq < before)]
        return Page(counts, found[:limit], found[limit - 1].seq if len(found) > limit else None)

    def examples(self, task: str) -> list[tuple[Example, Path]]:
        """All pictures as training examples, oldest first, and where they lie."""
        return [
            (_example(word), self._picture(task, word.sha256)) for word in reversed(self._read(task).newest_first())
        ]

    def delete(self, task: str, sha256: str) -> None:
        """Withdraw what was said about a picture and forget it. Raises NotFound feedback_not_found."""
        with disk(), flocked(self._lock):
            words = self._file(task).read()
            if sha256 not in words.last:
                raise no_feedback(task, sha256)
            self._file(task).append(Word(words.next_seq, sha256, ""))
            self._picture(task, sha256).unlink(missing_ok=True)

    def delete_task(self, task: str) -> None:
        """All of a task's feedback; there may be none."""
        with disk(), flocked(self._lock):
            gone = self._root / f"{_GONE}{secrets.token_hex(8)}"
            try:
                os.replace(self._root / task, gone)
            except FileNotFoundError:
                return
            sync(self._root)
            shutil.rmtree(gone)

    # --- words --------------------------------------------------------------------------------------------------------

    def _add(self, task: str, data: bytes, label: str, size: tuple[int, int]) -> Added:
        sha256 = hashlib.sha256(data).hexdigest()
        words = self._file(task).read()
        known = words.last.get(sha256)
        if known is not None and known.label == label:
            return Added(known, label)
        if known is None and len(words.last) >= self._max_images:
            detail = f"task {task!r} has {len(words.last)} images of feedback, as many as are kept"
            raise Conflict(detail, code="feedback_full")
        self._keep_picture(task, sha256, data)
        word = Word(words.next_seq, sha256, label, len(data), *size, time.time())
        self._file(task).append(word)
        return Added(word, known.label if known else None)

    def _size(self, data: bytes, at: int, count: int) -> tuple[int, int]:
        """Width and height, by looking at every pixel."""
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

    def _file(self, task: str) -> WordFile:
        return self._files.setdefault(task, WordFile(self._root / task / "words"))

    def _read(self, task: str) -> Words:
        with disk():
            return self._file(task).read()

    def _picture(self, task: str, sha256: str) -> Path:
        return self._root / task / "pictures" / sha256

    def _keep_picture(self, task: str, sha256: str, data: bytes) -> None:
        """Under the lock, so that a file that is not whole belongs to a dead process."""
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
        """Pictures that nobody said a word about, and tasks that were being deleted."""
        if folder.name.startswith(_GONE):
            shutil.rmtree(folder)
            return
        try:
            said = self._file(folder.name).read().last
        except Unavailable as error:
            log.error("pictures of %s are kept: %s", folder.name, error.detail)
            return
        for path in (folder / "pictures").glob("*"):
            if path.name not in said:
                path.unlink()


def _example(word: Word) -> Example:
    name = f"feedback/{word.sha256[:12]}"
    return Example("train", word.label, name, word.sha256, word.bytes, word.width, word.height)


def no_feedback(task: str, sha256: str) -> NotFound:
    return NotFound(f"task {task!r} has no feedback {shown(sha256, 64)!r}", code="feedback_not_found")
