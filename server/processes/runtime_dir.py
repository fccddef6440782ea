"""The folder that the processes of one server share: taken at the start, and cleared away by whoever starts later if
its owner was killed.

The owner, and whatever it forks, holds a lock on a file in it for as long as it lives; the kernel lets go of that lock
however they end. So a folder whose lock can be had is nobody's. One without a lock is somebody's who is just beginning,
or no server's at all, and stays.
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
def taken() -> Iterator[Path]:
    """A new folder that is its owner's alone, gone afterwards; what killed servers of this user left is swept first.

    Raises OSError.
    """
    sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / "new.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "new.lock").rename(folder / LOCK)  # only now can a sweep see it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(among: Path) -> None:
    """Remove the folders in `among` that servers of this user have left. What cannot be removed stays."""
    for folder in among.glob(f"{PREFIX}*"):
        try:
            if _is_ours(folder) and _is_left(folder):
                log.info("removed %s, which a server that was killed had left", folder)
        except OSError:
            continue


def _is_ours(folder: Path) -> bool:
    """A folder, not a link to one, that nobody else can write to."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _is_left(folder: Path) -> bool:
    """Removed, if its lock can be had. Raises OSError."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)  # follows no links
    finally:
        os.close(lock)
    return True
