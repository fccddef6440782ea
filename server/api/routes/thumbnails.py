"""Thumbnails of a dataset's images: decoded and encoded anew, so that no uploaded byte reaches a browser."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from lensrack import wire
from server.api.services import ServicesOf
from server.datasets.dataset import Example
from server.datasets.dataset_store import DatasetStore
from server.engine.images import decode
from server.errors import NotFound

router = APIRouter(tags=["datasets"])

MEDIA_TYPE: Final = "image/jpeg"
QUALITY: Final = 82
CACHED: Final = 4  # datasets whose images' digests are cached: a page of thumbnails is of one dataset
MOST: Final = 200
AT_ONCE: Final = 2  # images decoded: a page requests dozens, and each may be of the largest size
_DIGEST_BYTES: Final = 32
_JPEG: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "As before."},
}

Side = Annotated[int, Query(ge=16, le=512, description="Most pixels of the longer side.")]


@router.get("/datasets/{dataset_id}/thumbnails")
async def list_thumbnails(
    services: ServicesOf,
    dataset_id: str,
    label: Annotated[str | None, Query(description="Only pictures of this label.")] = None,
    per_label: Annotated[int, Query(ge=1, le=50)] = 1,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 60,
) -> wire.ThumbnailList:
    """A few pictures of each label, in the labels' order; `number` names one."""
    dataset = await asyncio.to_thread(services.datasets.get, dataset_id)
    order = {name: place for place, name in enumerate(dataset.labels)}
    chosen = _some(dataset.examples, label, per_label)
    thumbnails = sorted(chosen, key=lambda thumbnail: (order[thumbnail.label], thumbnail.number))
    return wire.ThumbnailList(thumbnails=thumbnails[:limit])


@router.get("/datasets/{dataset_id}/thumbnails/{number}", response_class=Response, responses=_JPEG)
async def get_thumbnail(
    request: Request, services: ServicesOf, dataset_id: str, number: Annotated[int, Path(ge=0)], side: Side = 128
) -> Response:
    """One picture of a dataset as a small JPEG, upright and without metadata."""
    sha256 = await asyncio.to_thread(_sha256, services.datasets, dataset_id, number)
    headers = {"ETag": f'"{sha256[:32]}-{side}"', "Cache-Control": "private, max-age=86400, immutable"}
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    small = partial(_small, services.datasets, sha256, side, services.settings.max_image_pixels)
    body = await request.app.state.thumbnails.run(services.tenant, small)
    return Response(body, media_type=MEDIA_TYPE, headers={**headers, "X-Content-Type-Options": "nosniff"})


# --- in threads -------------------------------------------------------------------------------------------------------


def _some(examples: Sequence[Example], label: str | None, per_label: int) -> Iterator[wire.Thumbnail]:
    """The first `per_label` of each label."""
    taken: Counter[str] = Counter()
    for number, example in enumerate(examples):
        if label in (None, example.label) and taken[example.label] < per_label:
            taken[example.label] += 1
            yield wire.Thumbnail(
                number=number,
                split=example.split,
                label=example.label,
                name=example.name,
                width=example.width,
                height=example.height,
            )


def _sha256(datasets: DatasetStore, dataset_id: str, number: int) -> str:
    digests = _digests(datasets, datasets.full_id(dataset_id))  # cached or not, the dataset must still exist
    if number >= len(digests) // _DIGEST_BYTES:
        there = len(digests) // _DIGEST_BYTES
        detail = f"expected the number of a picture from 0 to {there - 1}, got {number}"
        raise NotFound(detail, code="picture_not_found")
    return digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES].hex()


@lru_cache(maxsize=CACHED)
def _digests(datasets: DatasetStore, dataset_id: str) -> bytes:
    """All images' digests, concatenated: reading a manifest of a million images for each would take seconds."""
    return b"".join(bytes.fromhex(example.sha256) for example in datasets.get(dataset_id).examples)


def _small(datasets: DatasetStore, sha256: str, side: int, max_pixels: int) -> bytes:
    picture = decode.decode(datasets.read(sha256), max_pixels=max_pixels)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
