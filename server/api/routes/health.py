"""Liveness, readiness and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from lensrack import wire
from server import __version__
from server.api.services import ServicesOf
from server.observability import metrics

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> wire.Health:
    """The process answers."""
    return wire.Health(status="ok", version=__version__)


@router.get("/readyz", response_model=wire.Ready, responses={503: {"model": wire.Ready}})
async def readyz(services: ServicesOf) -> Response:
    """Predictions can be answered; otherwise 503 with the same body, which says what is missing."""
    ready = await asyncio.to_thread(services.ready)  # its checks may read the store
    return Response(ready.model_dump_json(), 200 if ready.ready else 503, media_type="application/json")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def get_metrics() -> Response:
    """Prometheus text format."""
    await metrics.refresh()
    return Response(generate_latest(metrics.scrape_registry), media_type=CONTENT_TYPE_LATEST)
