"""Attention maps: where the network looked when it answered about an image."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request

from lensrack import wire
from server.api import params
from server.api.services import ServicesOf, request_id
from server.errors import Unprocessable

from . import predict

router = APIRouter(tags=["predictions"])

DIGITS: Final = 6
_BODY: Final[dict[str, Any]] = {"parameters": [predict.KEY_HEADER], "requestBody": predict.IMAGES}


@router.post("/tasks/{task}/attention", openapi_extra=_BODY)
async def attention(request: Request, services: ServicesOf, ref: params.RefOf) -> wire.Attention:
    """The attention of `task`, `task@alias` or `task@version` over one image: of the class token in the last block, and
    rolled out through all blocks. Slower than a prediction, and one at a time."""
    images = await predict.read_images(request, services)
    if len(images) != 1:
        raise Unprocessable(f"images: expected 1, got {len(images)}")
    work = services.predictor.run_exclusive(
        ref,
        images[0],
        services.look,
        key=request.headers.get("Lensrack-Key") or request_id(request),
        tenant=services.tenant,
        timeout_s=services.settings.request_timeout_s,
    )
    version, seat, maps = await predict.unless_gone(request, work)
    return wire.Attention(
        task=seat.task,
        version=version,
        last=_attention_map(maps.last),
        rollout=_attention_map(maps.rollout),
        crop_mode=seat.geometry.crop_mode,
        crop_pct=seat.geometry.crop_pct,
    )


def _attention_map(attended: Any) -> wire.Looked:
    grid = attended.grid.round(DIGITS).tolist()
    return wire.Looked(grid=grid, prompts=round(attended.prompts, DIGITS), rest=round(attended.rest, DIGITS))
