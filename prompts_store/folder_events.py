"""In which of a folder's folders something has changed, as the kernel tells it.

By inotify where there is one: told at once; between changes the thread wakes for its stop event alone. Elsewhere by
watchfiles, which looks every 10 ms and gathers what it has seen until nothing more comes. Neither tells everything:
queues overflow, watches run out, and a remote disk is silent. So whoever watches looks at everything now and then.
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

Names = Set[str] | None  # None: nobody knows, look at everything
STOP_S: Final = 0.1  # between two looks at a watcher's stop event
DEEPEST: Final = 2  # levels of folders that are watched: the folder's own folders, and theirs
STEP_MS, GATHERED_MS = 10, 200  # of watchfiles: quiet for so long, told at once; the longest that changes are gathered


def touched(root: Path, stop: threading.Event, every_s: float) -> Iterator[Names]:
    """Names of the folders in `root`, and of files, in or under which something has been made, moved, written or
    deleted; None at first, when that is not known, and every `every_s`. Names that begin with a dot do not count. Ends
    soon after `stop` is set."""
    by_kernel = _by_inotify if sys.platform == "linux" else _by_watchfiles
    return by_kernel(root, stop, every_s)


def _by_inotify(root: Path, stop: threading.Event, every_s: float) -> Iterator[Names]:
    with closing(_Watches(root)) as watches:
        yield None  # what happened before anybody listened
        looked = time.monotonic()
        while not stop.is_set():
            found = watches.read(STOP_S)
            now = time.monotonic()
            if found is None or now - looked >= every_s:
                looked = now
                yield None
            elif found:
                yield found


class _Watches:
    """inotify on a folder and those in it, DEEPEST levels down. Source: inotify(7)."""

    def __init__(self, root: Path) -> None:
        from inotify_simple import INotify, flags

        self._seen = flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.CLOSE_WRITE
        self._only_folders, self._lost, self._left = flags.ONLYDIR, flags.Q_OVERFLOW, flags.IGNORED
        self._is_folder = flags.ISDIR
        self._root = root
        self._folders: dict[int, tuple[Path, str, int]] = {}  # by watch: the folder, its name under the root, its level
        self._lacking = False
        try:
            self._inotify: INotify | None = INotify()
        except OSError as error:  # the user has as many as the system allows, or it has none
            self._inotify = None
            self._lacks(error)
            return
        self._add(root, "", 0)

    def read(self, timeout_s: float) -> Names:
        """What has been touched, after that time at the latest; maybe nothing."""
        if self._inotify is None:
            time.sleep(timeout_s)
            return set()
        found: set[str] = set()
        for event in self._inotify.read(timeout=round(timeout_s * 1000)):
            if event.mask & self._lost:
                self._add(self._root, "", 0)  # among what is lost there may be folders that nobody watches yet
                return None
            found |= self._names(event)
        return found

    def close(self) -> None:
        if self._inotify is not None:
            self._inotify.close()

    def _names(self, event: Event) -> Set[str]:
        if event.mask & self._left:  # the folder is gone
            self._folders.pop(event.wd, None)
            return set()
        if event.wd not in self._folders or event.name.startswith("."):
            return set()
        folder, name, level = self._folders[event.wd]
        own = name or event.name
        if event.mask & self._is_folder and level < DEEPEST:
            self._add(folder / event.name, own, level + 1)
        return {own}

    def _add(self, folder: Path, name: str, level: int) -> None:
        """With the folders that are in it already: those that come later are told of."""
        assert self._inotify is not None
        try:
            watch = self._inotify.add_watch(folder, self._seen | self._only_folders)
        except (FileNotFoundError, NotADirectoryError):  # gone again
            return
        except OSError as error:
            self._lacks(error)
            return
        self._folders[watch] = folder, name, level
        if level < DEEPEST:
            for one in _folders_in(folder):
                self._add(folder / one, name or one, level + 1)

    def _lacks(self, error: OSError) -> None:
        if not self._lacking:
            self._lacking = True
            log.warning(
                "the system gives no more inotify watches (%s): some changes of files are seen seconds late; "
                "see fs.inotify.max_user_watches and fs.inotify.max_user_instances",
                error.strerror,
            )


def _folders_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")]
    except OSError:  # gone again, or not ours to read
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
        seen = {own[0] for own in parts if own and not own[-1].startswith(".")}
        if seen or not events:
            yield seen or None
