"""Reads the rows of one hostile parquet file, in a process of its own:
`python -m server.datasets.formats.parquet_reader`.

    footer ──► columns ──► for each row group: page headers ──► batches of as many rows as memory allows ──► rows

The file is standard input; what comes out, in parquet_frames. Only a picture's bytes and its label are ever
unpacked; a path beside the bytes is not even read. The library is thorough, yet one wrong number in a footer can end
its process (std::terminate). So memory and time are limited by the kernel, and whoever started this outlives it.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from server.datasets.dataset import bad
from server.errors import BadRequest

from .layout import label_of
from .member_names import shown
from .metering import MIB, Limits, refused
from .parquet_columns import Columns, columns_of
from .parquet_frames import write_frame
from .parquet_pages import MAGIC, Chunk, largest_page

MAX_FOOTER_BYTES: Final = 16 * MIB
BATCH_BYTES: Final = 64 * MIB  # the most that a batch of several rows can unpack to
MAX_BATCH_ROWS: Final = 256
MAX_MEMORY_BYTES: Final = 2048 * MIB  # address space, of which the libraries take a third
CPU_S: Final = 60
BYTES_PER_CPU_S: Final = 4 * MIB

_TAIL_BYTES: Final = 8  # the footer's length and the magic
_UNKNOWN: Final = -1  # Hugging Face's label of what has none

Row = tuple[Any, Any]  # picture, label


def main(about: str, max_members: int, max_ratio: float, ratio_free_bytes: int) -> None:
    file, out = os.fdopen(0, "rb"), sys.stdout.buffer
    _limit(os.fstat(0).st_size)
    limits = Limits(max_members, max_ratio=max_ratio, ratio_free_bytes=ratio_free_bytes)
    try:
        for data, told in rows(file, about, limits):
            write_frame(out, b"n" if data is None else b"p", told, data or b"")
        write_frame(out, b"e", {})
    except BadRequest as error:
        write_frame(out, b"e", {"code": error.code, "detail": error.detail})
    except OSError as error:
        write_frame(out, b"e", {"errno": error.errno})
    out.flush()


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    seconds = CPU_S + size // BYTES_PER_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def rows(file: BinaryIO, about: str, limits: Limits) -> Iterator[tuple[bytes | None, dict[str, str]]]:
    """A picture and its label, or the reason why it has none. Raises `BadRequest` bad_archive or bad_dataset."""
    _check_footer(file, about)
    with _reading(about):
        parquet = pq.ParquetFile(
            file, buffer_size=MIB, thrift_string_size_limit=MAX_FOOTER_BYTES, thrift_container_size_limit=MIB
        )
        schema = parquet.schema_arrow
    if parquet.metadata.num_rows > limits.max_members:
        raise refused(f"{about} has {parquet.metadata.num_rows:,} rows; at most {limits.max_members:,} are allowed")
    columns = columns_of(about, schema)
    for data, label in _rows(file, parquet, columns, about, limits):
        yield data, _told(about, label, columns)


def _told(about: str, label: int | str | None, columns: Columns) -> dict[str, str]:
    if label is None or label == "" or (label == _UNKNOWN and columns.names):
        return {"reason": "its row has no label"}
    if not columns.names:
        return {"label": label_of(str(label))}
    if not isinstance(label, int) or not 0 <= label < len(columns.names):
        known = f"numbers from 0 to {len(columns.names) - 1}, for which there are names"
        raise bad(f"{about}: expected labels as {known}; found {label}")
    return {"label": label_of(columns.names[label])}


def _check_footer(file: BinaryIO, about: str) -> None:
    """Its length, which the library reads into memory as it is told."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if size < len(MAGIC) + _TAIL_BYTES or tail[4:] != MAGIC:
        raise refused(f"{about} is damaged or truncated: it does not end as a parquet file does")
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(MAX_FOOTER_BYTES, size - _TAIL_BYTES - len(MAGIC)):
        raise refused(f"{about} claims a footer of {footer:,} bytes; at most {MAX_FOOTER_BYTES:,} and the file's own")


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(file: BinaryIO, parquet: pq.ParquetFile, columns: Columns, about: str, limits: Limits) -> Iterator[Row]:
    leaves = _leaves(parquet, columns, about)
    for group in range(parquet.metadata.num_row_groups):
        if not parquet.metadata.row_group(group).num_rows:
            continue
        with _reading(about):
            chunks = [_chunk(parquet, group, leaf, about) for leaf in leaves]
        size = sum(largest_page(file, chunk, limits) for chunk in chunks)
        rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(1, size)))  # no value is larger than its page
        batches = parquet.iter_batches(rows, row_groups=[group], columns=list(columns.leaves), use_threads=False)
        while (batch := _next(batches, about)) is not None:
            yield from zip(_pictures(batch, columns), batch.column(columns.label).to_pylist(), strict=True)


def _next(batches: Iterator[pa.RecordBatch], about: str) -> pa.RecordBatch | None:
    with _reading(about):
        batch = next(batches, None)
        if batch is not None:
            batch.validate(full=True)
        return batch


def _pictures(batch: pa.RecordBatch, columns: Columns) -> list[bytes | None]:
    image = batch.column(columns.image)
    if not columns.nested:
        return list(image.to_pylist())
    return [None if row is None else row["bytes"] for row in image.to_pylist()]


def _leaves(parquet: pq.ParquetFile, columns: Columns, about: str) -> list[int]:
    """The numbers of the columns that are read: of one value a row, and called so once."""
    schema = parquet.schema
    known = [schema.column(number) for number in range(len(schema))]
    for leaf in columns.leaves:
        fitting = [column for column in known if column.path == leaf or column.path.startswith(f"{leaf}.")]
        if len(fitting) != 1 or fitting[0].max_repetition_level:
            raise bad(f"{about}: expected one column {shown(leaf, 60)!r} of one value a row, found {len(fitting)}")
    paths = [column.path for column in known]
    return [paths.index(leaf) for leaf in columns.leaves]


def _chunk(parquet: pq.ParquetFile, group: int, leaf: int, about: str) -> Chunk:
    rows = parquet.metadata.row_group(group)
    column = rows.column(leaf)
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        starts.append(column.dictionary_page_offset)
    chunk = Chunk(shown(column.path_in_schema, 60), min(starts), column.total_compressed_size, column.num_values)
    if column.file_path or not (chunk.start > 0 and chunk.length >= 0 and chunk.values == rows.num_rows):
        raise refused(f"{about} is damaged: column {chunk.name!r} has impossible numbers in row group {group}")
    return chunk


@contextmanager
def _reading(about: str) -> Iterator[None]:
    """What the library raises on damaged input, as our refusal. A failing disk (it has an errno) stays what it is."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise refused(f"{about} is damaged or truncated ({type(error).__name__})") from error


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
