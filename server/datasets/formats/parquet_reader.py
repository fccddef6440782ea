"""Reads the rows of one hostile parquet file, in a separate process:
`python -m server.datasets.formats.parquet_reader`.

    footer ──► columns ──► for each row group: page headers ──► batches of as many rows as memory allows ──► rows

The file is standard input; standard output has the format of `parquet_frames`. Only a picture's bytes and its label are
ever unpacked; a path beside the bytes is not read. The library checks much, yet one wrong number in a footer can end
its process (std::terminate). So the kernel limits memory and time, and the server survives a crash of this process.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from server.datasets.dataset import bad_dataset
from server.datasets.label import label_of
from server.errors import BadRequest

from .member_names import printable
from .metering import MIB, Limits, bad_archive
from .parquet_columns import Columns, class_names, columns_of, plain_columns
from .parquet_frames import write_frame
from .parquet_pages import MAGIC, Chunk, largest_page
from .table_columns import columns_of_table

MAX_FOOTER_BYTES: Final = 16 * MIB
BATCH_BYTES: Final = 64 * MIB  # unpacked, of a batch of more than one row
MAX_BATCH_ROWS: Final = 256
MAX_MEMORY_BYTES: Final = 2048 * MIB  # address space; the libraries take a third of it
CPU_S: Final = 60
BYTES_PER_CPU_S: Final = 4 * MIB

_TAIL_BYTES: Final = 8  # the footer's length and the magic
_UNKNOWN: Final = -1  # Hugging Face's number for a missing label

Row = tuple[bytes, bytes | None, dict[str, str]]  # kind of frame, picture, message


def main(name: str, label_column: str, may_be_table: bool, limits: Limits) -> None:
    """`label_column`: empty where no column was chosen. `may_be_table`: a file without pictures may label others."""
    file, out = os.fdopen(0, "rb"), sys.stdout.buffer
    _limit(os.fstat(0).st_size)
    try:
        for kind, data, message in rows(file, name, limits, label_column or None, may_be_table):
            write_frame(out, kind, message, data or b"")
        write_frame(out, b"e", {})
    except BadRequest as error:
        write_frame(out, b"e", {"code": error.code, "detail": error.detail, **error.extra})
    except OSError as error:
        write_frame(out, b"e", {"errno": error.errno})
    out.flush()


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    seconds = CPU_S + size // BYTES_PER_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def rows(
    file: BinaryIO, name: str, limits: Limits, label_column: str | None = None, may_be_table: bool = False
) -> Iterator[Row]:
    """Each row: the picture, and {"label": …} or {"reason": …}; of a table {"file": …, "label": …, "split": …}.

    Raises `BadRequest` bad_archive or bad_dataset.
    """
    _check_footer(file, name)
    with _refuse_damage(name):
        parquet = pq.ParquetFile(
            file, buffer_size=MIB, thrift_string_size_limit=MAX_FOOTER_BYTES, thrift_container_size_limit=MIB
        )
        schema = parquet.schema_arrow
    if parquet.metadata.num_rows > limits.max_members:
        raise bad_archive(f"{name} has {parquet.metadata.num_rows:,} rows; at most {limits.max_members:,} are allowed")
    try:
        columns = columns_of(name, schema, label_column)
    except BadRequest as error:
        if not (may_be_table and error.extra.get("no_pictures")):
            raise
        yield from _table_rows(file, parquet, name, limits, label_column)
        return
    for batch in _batches(file, parquet, columns.leaves, name, limits):
        for data, label in zip(_pictures(batch, columns), batch.column(columns.label).to_pylist(), strict=True):
            yield b"n" if data is None else b"p", data, _message(name, label, columns)


def _table_rows(
    file: BinaryIO, parquet: pq.ParquetFile, name: str, limits: Limits, label_column: str | None
) -> Iterator[Row]:
    schema = parquet.schema_arrow
    picture, label, split = columns_of_table(name, plain_columns(schema), label_column)
    leaves = (picture, label, split) if split else (picture, label)
    names = class_names(name, schema, label)
    for batch in _batches(file, parquet, leaves, name, limits):
        for row in zip(*(batch.column(leaf).to_pylist() for leaf in leaves), strict=True):
            named = dict(zip(("file", "label", "split"), row, strict=False))
            if names and named["label"] is not None:
                named["label"] = _message(name, named["label"], Columns("", False, label, names)).get("label")
            yield b"t", None, {key: str(value) for key, value in named.items() if value is not None}


def _message(name: str, label: int | str | None, columns: Columns) -> dict[str, str]:
    if label is None or label == "" or (label == _UNKNOWN and columns.names):
        return {"reason": "its row has no label"}
    if not columns.names:
        return {"label": label_of(str(label))}
    if not isinstance(label, int) or not 0 <= label < len(columns.names):
        allowed = f"numbers from 0 to {len(columns.names) - 1}, which have names"
        raise bad_dataset(f"{name}: expected labels as {allowed}; found {label}")
    return {"label": label_of(columns.names[label])}


def _check_footer(file: BinaryIO, name: str) -> None:
    """Check the footer's length, since the library reads as much into memory as the file claims."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    if size < len(MAGIC) + _TAIL_BYTES or tail[4:] != MAGIC:
        raise bad_archive(f"{name} is damaged or truncated: it does not end like a parquet file")
    footer = int.from_bytes(tail[:4], "little")
    if footer > min(MAX_FOOTER_BYTES, size - _TAIL_BYTES - len(MAGIC)):
        allowed = f"at most {MAX_FOOTER_BYTES:,}, and no more than the file has, are allowed"
        raise bad_archive(f"{name} claims a footer of {footer:,} bytes; {allowed}")


# --- rows -------------------------------------------------------------------------------------------------------------


def _batches(
    file: BinaryIO, parquet: pq.ParquetFile, columns: Sequence[str], name: str, limits: Limits
) -> Iterator[pa.RecordBatch]:
    leaves = _leaves(parquet, columns, name)
    for group in range(parquet.metadata.num_row_groups):
        if not parquet.metadata.row_group(group).num_rows:
            continue
        with _refuse_damage(name):
            chunks = [_chunk(parquet, group, leaf, name) for leaf in leaves]
        size = sum(largest_page(file, chunk, limits) for chunk in chunks)
        rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(1, size)))  # no value is larger than its page
        batches = parquet.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)
        while (batch := _next(batches, name)) is not None:
            yield batch


def _next(batches: Iterator[pa.RecordBatch], name: str) -> pa.RecordBatch | None:
    with _refuse_damage(name):
        batch = next(batches, None)
        if batch is not None:
            batch.validate(full=True)
        return batch


def _pictures(batch: pa.RecordBatch, columns: Columns) -> list[bytes | None]:
    image = batch.column(columns.image)
    if not columns.nested:
        return list(image.to_pylist())
    return [None if row is None else row["bytes"] for row in image.to_pylist()]


def _leaves(parquet: pq.ParquetFile, columns: Sequence[str], name: str) -> list[int]:
    """The numbers of the columns to read. Raises unless each path occurs once and has one value a row."""
    schema = parquet.schema
    leaf_columns = [schema.column(number) for number in range(len(schema))]
    for leaf in columns:
        matching = [column for column in leaf_columns if column.path == leaf or column.path.startswith(f"{leaf}.")]
        if len(matching) != 1 or matching[0].max_repetition_level:
            expected = f"one column {printable(leaf, 60)!r} of one value a row"
            raise bad_dataset(f"{name}: expected {expected}, found {len(matching)}")
    paths = [column.path for column in leaf_columns]
    return [paths.index(leaf) for leaf in columns]


def _chunk(parquet: pq.ParquetFile, group: int, leaf: int, name: str) -> Chunk:
    rows = parquet.metadata.row_group(group)
    column = rows.column(leaf)
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        starts.append(column.dictionary_page_offset)
    chunk = Chunk(printable(column.path_in_schema, 60), min(starts), column.total_compressed_size, column.num_values)
    if column.file_path or not (chunk.start > 0 and chunk.length >= 0 and chunk.values == rows.num_rows):
        raise bad_archive(f"{name} is damaged: column {chunk.name!r} has impossible numbers in row group {group}")
    return chunk


@contextmanager
def _refuse_damage(name: str) -> Iterator[None]:
    """Turn what the library raises on damaged input into `BadRequest`. Disk errors (with an errno) pass through."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise bad_archive(f"{name} is damaged or truncated ({type(error).__name__})") from error


if __name__ == "__main__":
    _name, _label_column, _may_be_table, _members, _ratio, _free_bytes = sys.argv[1:]
    _limits = Limits(int(_members), max_ratio=float(_ratio), ratio_free_bytes=int(_free_bytes))
    main(_name, _label_column, _may_be_table == "table", _limits)
