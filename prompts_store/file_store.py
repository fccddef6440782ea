"""A store of files on one machine or a shared disk, readable with `ls`:

    tasks/<task>/versions/<version>.safetensors     bundles, which never change
    tasks/<task>/aliases.json                       aliases with their history
    tasks/<task>/.new-<random>                      a file being written; left by a crash, the next writer deletes it
    tasks/<task>/.gone-<random>/                    versions being deleted; left by a crash, the next writer ends it
    locks/<task>.lock                               locked during a change of the task

Files appear whole: write → fsync → rename → fsync of the folder. Readers take no lock. Writers of a task, in threads
and processes, take turns by flock, which the kernel releases when its holder dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prompts_store import folder_events
from prompts_store.alias import ANY, Alias, AliasBook, Expect, Targets
from prompts_store.bundle import Bundle, header_bytes, read_manifest
from prompts_store.durable_files import FULL, NEW, new_file, sync_folder
from prompts_store.errors import BundleError, StoreFull, StoreUnavailable, TaskNotFound, VersionInUse, VersionNotFound
from prompts_store.names import is_task, is_version
from prompts_store.store import Change, VersionInfo, newest_first

log = logging.getLogger(__name__)

SUFFIX: Final = ".safetensors"
GONE: Final = ".gone-"  # how the names of folders of deleted versions begin
RECONCILE_S: Final = 2.0  # events of the kernel may overflow, and a remote disk sends none

_Stamp = tuple[object, ...]
_NOTHING: Final[_Stamp] = (frozenset[str](),)  # of a task that does not exist yet


class FileStore:
    """The store contract over a folder, which is created when it is missing."""

    def __init__(self, root: Path) -> None:
        self._tasks, self._locks = root / "tasks", root / "locks"
        with _disk():
            for folder in (self._tasks, self._locks):
                _make_folder(folder)
        self._sweep_all()

    def put(self, bundle: Bundle) -> str:
        task = bundle.manifest.task
        kept = Bundle.verified(bundle.data, task=task, version=bundle.version)
        with self._changing(task):
            path = self._path(task, kept.version)
            _make_folder(path.parent)
            if _read(path) != kept.data:  # absent or damaged: writing it repairs both
                _write(path, kept.data, self._tasks / task)
        return kept.version

    def get(self, task: str, version: str) -> Bundle:
        with _disk():
            data = _read(self._path(task, version)) if is_task(task) and is_version(version) else None
            if data is None:
                self._require_versions(task)
                raise VersionNotFound(task, version)
        return Bundle.verified(data, task=task, version=version)

    def tasks(self) -> list[str]:
        with _disk():
            return sorted(name for name in os.listdir(self._tasks) if is_task(name) and self._version_names(name))

    def versions(self, task: str) -> list[VersionInfo]:
        with _disk():
            infos = [self._info(task, version) for version in self._require_versions(task)]
        return newest_first(info for info in infos if info is not None)

    def aliases(self, task: str) -> dict[str, Alias]:
        with _disk():
            self._require_versions(task)
            return self._book(task).current()

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        with self._changing_existing(task) as (versions, book):
            changed = book.set(alias, targets, expect=expect, versions=versions, now=time.time())
            self._save(task, book)
        return changed

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        with self._changing_existing(task) as (_, book):
            book.delete(alias, expect=expect)
            self._save(task, book)

    def history(self, task: str, alias: str) -> list[Alias]:
        with _disk():
            self._require_versions(task)
            return self._book(task).history(alias)

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        with self._changing_existing(task) as (versions, book):
            changed = book.rollback(alias, expect=expect, versions=versions, now=time.time())
            self._save(task, book)
        return changed

    def delete_version(self, task: str, version: str) -> None:
        with self._changing_existing(task) as (versions, book):
            if version not in versions:
                raise VersionNotFound(task, version)
            if users := book.users_of(version):
                raise VersionInUse(task, version, users)
            path = self._path(task, version)
            path.unlink(missing_ok=True)
            sync_folder(path.parent)

    def delete_task(self, task: str) -> None:
        """Delete a task by one rename, which needs no space on a full disk; what follows frees some first."""
        with self._changing_existing(task):
            folder = self._tasks / task
            os.replace(folder / "versions", folder / f"{GONE}{secrets.token_hex(8)}")
            sync_folder(folder)
            self._finish_deletion(task)

    def close(self) -> None:
        """There is nothing to close: locks are held only during a call."""

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        with _disk():
            return self._changes(stop, self._stamps(os.listdir(self._tasks)))

    def _changes(self, stop: threading.Event, seen: dict[str, _Stamp]) -> Iterator[Change]:
        """Events say which tasks to check; comparing stamps tells what changed, missed events included."""
        with _disk():
            for names in folder_events.changed_names(self._tasks, stop, RECONCILE_S):
                now = self._stamps({*seen, *os.listdir(self._tasks)} if names is None else names)
                changed = sorted(task for task, stamp in now.items() if stamp != seen.get(task, _NOTHING))
                seen |= now
                yield from map(Change, changed)

    def _stamps(self, names: Iterable[str]) -> dict[str, _Stamp]:
        """Return a stamp for each task, which any change of the task changes: a rename gives a new inode."""
        stamps: dict[str, _Stamp] = {}
        for task in filter(is_task, names):
            try:
                book = os.stat(self._tasks / task / "aliases.json")
                stamps[task] = (self._version_names(task), book.st_ino, book.st_mtime_ns)
            except FileNotFoundError:
                stamps[task] = (self._version_names(task),)
        return stamps

    # --- reading ------------------------------------------------------------------------------------------------------

    def _path(self, task: str, version: str) -> Path:
        return self._tasks / task / "versions" / f"{version}{SUFFIX}"

    def _version_names(self, task: str) -> frozenset[str]:
        try:
            files = os.listdir(self._tasks / task / "versions")
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        return frozenset(file.removesuffix(SUFFIX) for file in files if is_version(file.removesuffix(SUFFIX)))

    def _require_versions(self, task: str) -> frozenset[str]:
        """Return the versions of a task. Raises TaskNotFound."""
        versions = self._version_names(task) if is_task(task) else frozenset()
        if not versions:
            raise TaskNotFound(task)
        return versions

    def _info(self, task: str, version: str) -> VersionInfo | None:
        """Read a version's header. None when the file was just deleted or is damaged; `get` raises what is wrong."""
        try:
            with open(self._path(task, version), "rb") as file:
                head = file.read(8)
                head += file.read(header_bytes(head) - 8)
                return VersionInfo(version, os.fstat(file.fileno()).st_size, read_manifest(head))
        except FileNotFoundError:
            return None
        except BundleError as error:
            log.warning("task %s: version %s is damaged and not listed: %s", task, version, error.detail)
            return None

    def _book(self, task: str) -> AliasBook:
        return AliasBook.from_json(task, _read(self._tasks / task / "aliases.json") or b"")

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, task: str) -> Iterator[None]:
        with _disk():
            lock = os.open(self._locks / f"{task}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._sweep(task)
                yield
            finally:
                os.close(lock)

    @contextmanager
    def _changing_existing(self, task: str) -> Iterator[tuple[frozenset[str], AliasBook]]:
        with _disk():
            self._require_versions(task)  # a name that is not a task must not leave a lock file behind
        with self._changing(task):
            yield self._require_versions(task), self._book(task)

    def _save(self, task: str, book: AliasBook) -> None:
        folder = self._tasks / task
        if text := book.to_json():
            _write(folder / "aliases.json", text.encode(), folder)

    def _finish_deletion(self, task: str) -> None:
        """Delete what `delete_task` has set aside, then clear the aliases, whose revisions must not be used again."""
        for gone in (self._tasks / task).glob(f"{GONE}*"):
            for path in gone.iterdir():
                path.unlink(missing_ok=True)
            try:
                book = self._book(task)
                book.clear()
                self._save(task, book)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                (self._tasks / task / "aliases.json").unlink(missing_ok=True)  # others took the space that was freed
            gone.rmdir()
            sync_folder(self._tasks / task)

    def _sweep(self, task: str) -> None:
        """Delete unfinished files. The caller holds the task's lock, so they belong to writers that have crashed."""
        for leftover in (self._tasks / task).glob(f"{NEW}*"):
            leftover.unlink(missing_ok=True)
        if any((self._tasks / task).glob(f"{GONE}*")):
            self._finish_deletion(task)

    def _sweep_all(self) -> None:
        with _disk():
            crashed = {path.parent.name for begin in (NEW, GONE) for path in self._tasks.glob(f"*/{begin}*")}
        for task in filter(is_task, crashed):
            with self._changing(task):
                log.info("task %s: deleted the unfinished files of a crash", task)


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def _disk() -> Iterator[None]:
    """Translate an OSError into a StoreError that names no path."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in FULL else StoreUnavailable
        raise kind(f"the file store failed: {error.strerror or type(error).__name__}") from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: Path, data: bytes, staging: Path) -> None:
    with new_file(path, staging) as file:
        file.write(data)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each durable."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
