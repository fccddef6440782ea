"""Spools a request's body to a file: from the socket to the disk, never into memory, and deleted at the end.

The file is locked while it grows. An unlocked one was left by a process that died; the next start sweeps it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from fastapi import Request

from server.errors import DiskFull, Silent

FOLDER: Final = "uploads"
WRITE_BYTES: Final = 2**20  # collected before a thread writes them: a hand-over for each packet would cost more


@asynccontextmanager
async def spooled(root: Path) -> AsyncIterator[tuple[Path, Callable[[bytes], None]]]:
    """Open an empty file below `root`, deleted at the end; yield its path and a function that appends to it.

    Raises DiskFull, as appending does.
    """
    path = root / FOLDER / secrets.token_hex(16)
    file = await asyncio.to_thread(_created, path)
    try:
        yield path, partial(_append, file)
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def sweep(root: Path) -> int:
    """Delete the files that dead processes have left; return how many."""
    return sum(_swept(path) for path in (root / FOLDER).glob("*"))


def _created(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                return file
            os.close(file)  # another process swept it between the two calls
    except OSError as error:
        raise _full() from error


def _swept(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)  # while it is locked, so that no process begins to write it
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


async def fill(request: Request, write: Callable[[bytes], None], *, silence_s: float | None = None) -> None:
    """Pass the body to `write`, in threads, in pieces of WRITE_BYTES; also the beginning of a body that breaks off.

    Raises what `write` raises, ClientDisconnect, TooLarge, and Silent when nothing arrives for `silence_s`.
    """
    pending = bytearray()
    try:
        async for chunk in _chunks(request, silence_s):
            pending += chunk
            if len(pending) >= WRITE_BYTES:
                piece, pending = bytes(pending), bytearray()
                await asyncio.to_thread(write, piece)
    except Exception:  # a cancellation leaves a piece in a thread, and nothing may be written after that
        await asyncio.to_thread(write, bytes(pending))
        raise
    await asyncio.to_thread(write, bytes(pending))


async def _chunks(request: Request, silence_s: float | None) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(silence_s):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise Silent(f"expected more of the body, got nothing for {silence_s:g} s") from error
        if chunk is None:
            return
        yield chunk


def _append(file: int, data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(file, left) :]
    except OSError as error:
        raise _full() from error


def _full() -> DiskFull:
    return DiskFull("the upload could not be written: the disk is full or failing")
