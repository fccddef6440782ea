"""Where the engine's process listens, and what front ends may ask it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SOCKET: Final = "engine"  # in the folder that the processes share
LOOK: Final = "look"
COUNTS: Final = "counts"  # a view that shows nothing: the engine's counts are in the ledger when it is answered


def socket_path(folder: Path, number: int) -> Path:
    return folder / f"{SOCKET}-{number}"
