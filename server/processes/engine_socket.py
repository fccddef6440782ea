"""The socket of an engine's process, and the names of what front ends call there besides predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SOCKET: Final = "engine"  # in the folder that the processes share
LOOK: Final = "look"  # work between two batches: an image's attention maps
COUNTS: Final = "counts"  # a view without content: once it is answered, the engine has written its metrics


def socket_path(folder: Path, number: int) -> Path:
    return folder / f"{SOCKET}-{number}"
