"""What routes take from a path and a header: task names and media types."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final

from fastapi import Depends
from starlette.datastructures import Headers

from server.errors import BadRequest, UnsupportedMedia
from server.serving.resolver import TASK

IMAGE_TYPES: Final = ("image/jpeg", "image/png", "image/webp", "image/bmp")
ARCHIVE_TYPES: Final = (
    "application/zip",
    "application/x-tar",
    "application/gzip",
    "application/x-gzip",
    "application/zstd",
    "application/vnd.apache.parquet",
    "application/octet-stream",
)


def task_name(task: str) -> str:
    """A task's name from a path. Raises BadRequest (bad_task_name)."""
    if not TASK.fullmatch(task):
        raise BadRequest(f"expected a task name like {TASK.pattern}, got {task[:100]!r}", code="bad_task_name")
    return task


async def _task_name(task: str) -> str:
    return task_name(task)


TaskOf = Annotated[str, Depends(_task_name)]


def media_type(headers: Headers) -> str:
    """The content type without its parameters; empty where there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def require_type(headers: Headers, expected: Collection[str]) -> str:
    """The body's media type, which must be among the expected ones. Raises UnsupportedMedia."""
    got = media_type(headers)
    if got not in expected:
        raise UnsupportedMedia(f"content type: expected {' or '.join(expected)}, got {got[:100] or 'none'}")
    return got
