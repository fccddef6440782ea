"""Files that appear whole and outlast a power cut: write → fsync → rename → fsync of the folder."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

NEW: Final = ".new-"  # how the names of unfinished files begin
FULL: Final = (errno.ENOSPC, errno.EDQUOT)  # of a write to a full disk, or beyond a quota


@contextmanager
def new_file(path: Path, staging: Path) -> Iterator[IO[bytes]]:
    """Open a new file in `staging`, on the same disk; it replaces `path` at the end, or goes after an error."""
    new = staging / f"{NEW}{secrets.token_hex(8)}"
    try:
        with open(new, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed and removed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
