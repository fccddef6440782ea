"""The pictures of a parquet file: a row is a file of its own, with its place.

the file ──stdin──► parquet_reader, a process with limits ──stdout──► frames
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

from server.datasets.example import Place, Skipped, Split
from server.errors import BadRequest

from .layout import split_of
from .member_names import shown
from .metering import Limits, Member, Meter, refused
from .parquet_frames import Frame, read_frame

_WORDS: Final = re.compile("[A-Za-z]+")

Path = tuple[str, ...]


def parquet_members(file: BinaryIO, path: Path, limits: Limits, total: Meter) -> Iterator[Member | Skipped]:
    """`path` is the file's own; it names the rows and may name their split. `total` counts what they unpack to.

    Raises `BadRequest`: bad_archive for what is damaged or hostile, bad_dataset for no set of labelled pictures.
    """
    about = f"the parquet file {shown('/'.join(path))!r}"
    split = split_of_file(path)
    for number, (kind, told, data) in enumerate(_frames(file, about, limits)):
        inner = (*path, str(number))
        if kind == b"n":
            yield Skipped("/".join(inner), "its row has no bytes; a path alone is never followed")
        else:
            total.add(len(data))
            yield Member(inner, len(data), io.BytesIO(data), _place(split, told))


def split_of_file(path: Path) -> Split:
    """By the name, as in train-00000-of-00002.parquet, or by a folder: data/test/0000.parquet."""
    for part in reversed(path):
        for word in _WORDS.findall(part.removesuffix(".parquet")):
            split = split_of(word)
            if split is not None:
                return split
    return "train"


def _place(split: Split, told: dict[str, Any]) -> Place:
    return (split, str(told["label"])) if "label" in told else str(told["reason"])


def _frames(file: BinaryIO, about: str, limits: Limits) -> Iterator[Frame]:
    with _reader(file, about, limits) as reader:
        assert reader.stdout is not None
        while (frame := read_frame(reader.stdout)) is not None:
            kind, told, _ = frame
            if kind == b"e":
                _raise(told)
                return
            yield frame
        reader.kill()  # where it still lives, it has said what no reader would
        code = reader.wait()
    raise refused(f"{about} is damaged or hostile: it broke its reader ({code})")


def _raise(told: dict[str, Any]) -> None:
    if "errno" in told:
        raise OSError(told["errno"], os.strerror(told["errno"]))
    if told:
        raise BadRequest(told["detail"], code=told["code"])


@contextmanager
def _reader(file: BinaryIO, about: str, limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    file.flush()
    file.seek(0)
    numbers = map(str, (limits.max_members, limits.max_ratio, limits.ratio_free_bytes))
    command = [sys.executable, "-m", "server.datasets.formats.parquet_reader", about, *numbers]
    with subprocess.Popen(
        command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
    ) as reader:
        try:
            yield reader
        finally:
            reader.kill()


def _environment() -> dict[str, str]:
    """Ours without our secrets, with allocators that keep within a limit of address space."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LENSRACK_")}
    found = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return {**kept, **found, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
