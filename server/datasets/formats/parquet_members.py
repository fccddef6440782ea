"""The pictures of a parquet file: each row is a member with its place.

the file ──stdin──► parquet_reader, a process with limits ──stdout──► frames
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

from server.datasets.example import Place, Skipped, Split
from server.errors import BadRequest

from .layout import MemberPath
from .manifest import is_table
from .member_names import printable
from .metering import Limits, Member, Meter, bad_archive
from .parquet_frames import Frame, read_frame
from .split_names import split_of

ROWS: Final = ("rows",)  # the path of a parquet file that is in no archive

_WORDS: Final = re.compile("[A-Za-z]+")


def parquet_members(
    file: BinaryIO, path: MemberPath, limits: Limits, total: Meter, label_column: str | None = None
) -> Iterator[Member | Skipped]:
    """The rows of a parquet file. `path` is the file's: it names the rows and may name their split. `total` counts the
    bytes that they unpack to. `label_column`: the column of the labels, where it has not a customary name.

    Inside an archive, a file without pictures is skipped, or is a table of labels of those beside it.

    Raises `BadRequest`: bad_archive for damaged or hostile input, bad_dataset where there are no labelled pictures.
    """
    split = split_of_file(path)
    frames = _frames(file, path, limits, label_column or "")
    for number, (kind, message, data) in enumerate(frames):
        inner = (*path, str(number))
        if kind == b"t":
            yield _table(path, itertools.chain([message], (row for _, row, _ in frames)), total)
        elif kind == b"s":
            yield Skipped("/".join(path), str(message["detail"]))
        elif kind == b"n":
            yield Skipped("/".join(inner), "its row has no picture bytes; paths are never followed")
        else:
            total.add(len(data))
            yield Member(inner, len(data), io.BytesIO(data), _place(split, message))


def split_of_file(path: MemberPath) -> Split:
    """The split that the file's name or a folder names: train-00000-of-00002.parquet, data/test/0000.parquet."""
    for part in reversed(path):
        for word in _WORDS.findall(part.removesuffix(".parquet")):
            split = split_of(word)
            if split is not None:
                return split
    return "train"


def _place(split: Split, message: dict[str, Any]) -> Place:
    return (split, str(message["label"])) if "label" in message else str(message["reason"])


def _table(path: MemberPath, rows: Iterable[dict[str, Any]], total: Meter) -> Member:
    """The rows as lines of JSON, which is what a table's reader reads."""
    lines = bytearray()
    for row in rows:
        line = json.dumps(row).encode() + b"\n"
        total.add(len(line))
        lines += line
    return Member(path, len(lines), io.BytesIO(lines))


def _frames(file: BinaryIO, path: MemberPath, limits: Limits, label_column: str) -> Iterator[Frame]:
    """The frames but for the end; `s` with the reason where a file in an archive has no pictures."""
    name, inside = f"the parquet file {printable('/'.join(path))!r}", path != ROWS
    table = "table" if inside and is_table(path) else "pictures"
    with _reader(file, [name, label_column, table], limits) as reader:
        assert reader.stdout is not None
        while (frame := read_frame(reader.stdout)) is not None:
            kind, message, _ = frame
            if kind == b"e":
                if inside and message.get("no_pictures"):
                    yield b"s", message, b""
                else:
                    _raise(message)
                return
            yield frame
        reader.kill()  # if it is still alive, it has broken the format of the frames
        code = reader.wait()
    raise bad_archive(f"{name} is damaged or hostile: its reader crashed or was stopped (exit status {code})")


def _raise(message: dict[str, Any]) -> None:
    if "errno" in message:
        raise OSError(message["errno"], os.strerror(message["errno"]))
    if message:
        raise BadRequest(message["detail"], code=message["code"])


@contextmanager
def _reader(file: BinaryIO, parameters: Sequence[str], limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    file.flush()
    file.seek(0)
    numbers = map(str, (limits.max_members, limits.max_ratio, limits.ratio_free_bytes))
    command = [sys.executable, "-m", "server.datasets.formats.parquet_reader", *parameters, *numbers]
    with subprocess.Popen(
        command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
    ) as reader:
        try:
            yield reader
        finally:
            reader.kill()


def _environment() -> dict[str, str]:
    """The environment without our settings, which hold secrets, and with allocators that need little address space."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LENSRACK_")}
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    allocators = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    return {**inherited, "PYTHONPATH": path, **allocators}
