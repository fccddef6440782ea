"""What routes take from a path and a header: tasks, their versions and media types."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final

from fastapi import Depends
from starlette.datastructures import Headers

from server.errors import UnsupportedMedia
from server.serving.resolver import Ref, Refs, task_name

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


async def _task_name(task: str) -> str:
    return task_name(task)


async def _ref(task: str) -> Ref:
    return Ref.parse(task)


async def _refs(task: str) -> Refs:
    return Ref.parse_all(task)


# of the path's `{task}`; each raises BadRequest (bad_task_name)
TaskOf = Annotated[str, Depends(_task_name)]  # `task`
RefOf = Annotated[Ref, Depends(_ref)]  # `task`, `task@alias` or `task@version`
RefsOf = Annotated[Refs, Depends(_refs)]  # and `task@one+other`


def media_type(headers: Headers) -> str:
    """Return the content type without its parameters; empty where there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def require_type(headers: Headers, expected: Collection[str]) -> str:
    """Return the body's media type. Raises UnsupportedMedia unless it is among the expected ones."""
    got = media_type(headers)
    if got not in expected:
        raise UnsupportedMedia(f"content type: expected {' or '.join(expected)}, got {got[:100] or 'none'}")
    return got
