"""What lies in a cache of arrays. Without torch: the processes of these tests start in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np

KEYS = [f"{number * 2654435761 % 2**32:08x}" for number in range(1, 200)]
SMALL = 4000  # values of a file that takes one block of 4096 bytes


def made(key: str, values: int = SMALL) -> np.ndarray:
    """What belongs under `key`."""
    return np.random.Generator(np.random.PCG64(int(key, 16))).integers(0, 256, values, np.uint8)


def held(folder: Path) -> int:
    """Bytes of all arrays, whole or being written, in blocks of the disk."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() or path.name == "lock" else -(-path.stat().st_size // 4096) * 4096
        except FileNotFoundError:
            continue
    return total


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def noted(folder: Path) -> int:
    return sum(int.from_bytes(lock.read_bytes(), "little") for lock in folder.rglob("lock"))
