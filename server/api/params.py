"""What routes take from a path and a header: tasks, their versions and media types."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from typing import Annotated, Final

from fastapi import Depends, Request
from starlette.datastructures import Headers

from server.errors import Unprocessable, UnsupportedMedia
from server.serving.resolver import Ref, Refs, task_name

OCTETS: Final = "application/octet-stream"
IMAGE_TYPES: Final = ("image/jpeg", "image/png", "image/webp", "image/bmp")
ARCHIVE_TYPES: Final = (
    "application/zip",
    "application/x-tar",
    "application/gzip",
    "application/x-gzip",
    "application/zstd",
    "application/vnd.apache.parquet",
    OCTETS,
)
# what clients send that know nothing of a body or say nothing: the second is curl's own, the third some object stores'
UNDECLARED: Final = frozenset({"", "application/x-www-form-urlencoded", "binary/octet-stream", OCTETS})
_LENIENT: Final = re.compile(r"/(v1|v2|healthz|readyz|metrics)\b")
_ARCHIVES: Final = re.compile(
    r"application/(x-)?(zip|zip-compressed|compressed|compressed-tar|tar|gtar|tgz|gtgz|gzip|bzip2?|xz|zstd|parquet|npz)"
)


def may_be_image(kind: str) -> bool:
    """Whether a body of this type is looked into: pictures are recognised by their content, not by their type."""
    return kind in UNDECLARED or kind.startswith("image/")


def may_be_archive(kind: str) -> bool:
    """As `may_be_image`, by all names under which archives travel."""
    return kind in UNDECLARED or _ARCHIVES.fullmatch(kind) is not None


async def require_known_query(request: Request) -> None:
    """Refuse a query parameter that the route does not know, which it would ignore: a typing error must not look like
    an answer. Not under the other protocols, whose clients may send more, nor of probes. Raises Unprocessable."""
    route = request.scope["route"]
    if not request.scope["query_string"] or not route.include_in_schema or _LENIENT.match(route.path):
        return
    known = [field.alias for field in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            if "task" in request.path_params:
                task_name(request.path_params["task"].partition("@")[0])  # a wrong path is what is told first
            near = difflib.get_close_matches(name.lower(), known, 1)
            guess = f" (did you mean {near[0]!r}?)" if near else ""
            expected = " or ".join(known) or "none at all"
            raise Unprocessable(f"query: expected the parameters {expected}, got {name[:100]!r}{guess}")


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


def require_type(
    headers: Headers, expected: Collection[str], also: Callable[[str], bool] = UNDECLARED.__contains__
) -> str:
    """Return the body's media type, OCTETS where none is declared. Raises UnsupportedMedia for an unexpected one.

    also: which others are taken; their names would only make the sentence longer.
    """
    got = media_type(headers)
    if got in UNDECLARED and also(got):
        return OCTETS
    if got not in expected and not also(got):
        raise UnsupportedMedia(f"content type: expected {' or '.join(expected)}, got {got[:100] or 'none'}")
    return got
