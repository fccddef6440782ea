"""Reports in which subfolders of a folder something has changed, by events of the kernel.

On Linux by inotify, which reports at once; between changes the thread wakes only to check its stop event. Elsewhere by
watchfiles, which polls every 10 ms and collects changes until no more come. Neither reports everything: queues
overflow, watches run out, and remote disks send no events. So a caller must check everything from time to time.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Set
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from inotify_simple import Event

log = logging.getLogger(__name__)

Names = Set[str] | None  # None: unknown, check everything
STOP_S: Final = 0.1  # between two checks of a watcher's stop event
DEEPEST: Final = 2  # levels of watched folders: the subfolders of the root, and their subfolders
STEP_MS, GATHERED_MS = 10, 200  # of watchfiles: changes are reported after so long without another; at the latest after


def changed_names(root: Path, stop: threading.Event, every_s: float) -> Iterator[Names]:
    """Yield the names of entries of `root` in or under which something was created, moved, written or deleted.

    Yields None, for "unknown", at first, every `every_s` seconds and after lost events. Names that begin with a dot are
    ignored. Ends soon after `stop` is set.
    """
    by_kernel = _by_inotify if sys.platform == "linux" else _by_watchfiles
    return by_kernel(root, stop, every_s)


def _by_inotify(root: Path, stop: threading.Event, every_s: float) -> Iterator[Names]:
    with closing(_InotifyTree(root)) as watches:
        yield None  # changes from before the first watch
        reported_all = time.monotonic()
        while not stop.is_set():
            names = watches.read(STOP_S)
            now = time.monotonic()
            if names is None or now - reported_all >= every_s:
                reported_all = now
                yield None
            elif names:
                yield names


class _InotifyTree:
    """inotify watches on a folder and its subfolders, DEEPEST levels down. Source: inotify(7)."""

    def __init__(self, root: Path) -> None:
        from inotify_simple import INotify, flags

        self._events = flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.CLOSE_WRITE
        self._only_folders, self._overflow, self._removed = flags.ONLYDIR, flags.Q_OVERFLOW, flags.IGNORED
        self._is_folder = flags.ISDIR
        self._root = root
        self._folders: dict[
            int, tuple[Path, str, int]
        ] = {}  # by watch: the folder, the name of its ancestor in the root, its level
        self._warned = False
        try:
            self._inotify: INotify | None = INotify()
        except OSError as error:  # the user's limit is reached, or the system has no inotify
            self._inotify = None
            self._warn_once(error)
            return
        self._add(root, "", 0)

    def read(self, timeout_s: float) -> Names:
        """Return the names that changed within `timeout_s` seconds, possibly none; None after an overflow."""
        if self._inotify is None:
            time.sleep(timeout_s)
            return set()
        names: set[str] = set()
        for event in self._inotify.read(timeout=round(timeout_s * 1000)):
            if event.mask & self._overflow:
                self._add(self._root, "", 0)  # among the lost events may be new folders, which have no watch yet
                return None
            names |= self._names(event)
        return names

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()

    def _names(self, event: Event) -> Set[str]:
        if event.mask & self._removed:  # the folder is gone
            self._folders.pop(event.wd, None)
            return set()
        if event.wd not in self._folders or event.name.startswith("."):
            return set()
        folder, name, level = self._folders[event.wd]
        top = name or event.name
        if event.mask & self._is_folder and level < DEEPEST:
            self._add(folder / event.name, top, level + 1)
        return {top}

    def _add(self, folder: Path, name: str, level: int) -> None:
        """Watch a folder and its present subfolders; events report those that are created later."""
        assert self._inotify is not None
        try:
            watch = self._inotify.add_watch(folder, self._events | self._only_folders)
        except (FileNotFoundError, NotADirectoryError):  # deleted meanwhile
            return
        except OSError as error:
            self._warn_once(error)
            return
        self._folders[watch] = folder, name, level
        if level < DEEPEST:
            for child in _folders_in(folder):
                self._add(folder / child, name or child, level + 1)

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the system allows no more inotify watches (%s): some file changes are noticed seconds late; "
                "see fs.inotify.max_user_watches and fs.inotify.max_user_instances",
                error.strerror,
            )


def _folders_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    except OSError:  # deleted meanwhile, or not readable
        return []


def _by_watchfiles(root: Path, stop: threading.Event, every_s: float) -> Iterator[Names]:
    from watchfiles import watch

    yield None
    wake_ups = watch(
        root,
        watch_filter=None,
        debounce=GATHERED_MS,
        step=STEP_MS,
        stop_event=stop,
        rust_timeout=round(every_s * 1000),
        yield_on_timeout=True,
        ignore_permission_denied=True,
    )
    above = len(root.parts)
    for events in wake_ups:
        parts = [Path(path).parts[above:] for _, path in events]
        names = {path[0] for path in parts if path and not path[-1].startswith(".")}
        if names or not events:
            yield names or None
