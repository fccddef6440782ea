"""The folder that the processes of one server share: made at the start, and removed by a later server where the owner
was killed.

The owner and its forks hold a lock on a file in the folder while they live; the kernel releases it however they end. So
a folder whose lock is free has no owner. A folder without a lock belongs to a server that is just starting, or to
another program, and stays.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

PREFIX: Final = "lensrack-"
LOCK: Final = "owner.lock"


@contextmanager
def create() -> Iterator[Path]:
    """Yield a new folder that only this user can enter, and remove it afterwards. Folders that killed servers of this
    user left are removed first. Raises OSError."""
    sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / "new.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "new.lock").rename(folder / LOCK)  # a sweep that ran before the lock was held has ignored it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(among: Path) -> None:
    """Remove the folders in `among` that killed servers of this user left. Those that cannot be removed stay."""
    for folder in among.glob(f"{PREFIX}*"):
        try:
            if _is_ours(folder) and _remove_if_unlocked(folder):
                log.info("removed %s, which a server that was killed had left", folder)
        except OSError:
            continue


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder, not a link to one, that only this user can enter."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _remove_if_unlocked(folder: Path) -> bool:
    """Remove the folder and return true. Raises OSError, also where its lock is held."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)  # follows no links
    finally:
        os.close(lock)
    return True
