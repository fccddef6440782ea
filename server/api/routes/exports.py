"""A version as a file for other tools. `server.app.exporter` makes it, apart from this process."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from email.utils import formatdate
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from lensrack import wire
from server.api import params, receiving
from server.api.services import ServicesOf

from .tasks import download_bundle

router = APIRouter(tags=["tasks"])

AT_ONCE: Final = 1  # exports: each loads the backbone once more
MEDIA_TYPE: Final = "application/octet-stream"
_ENDINGS: Final = {"onnx": ".onnx", "timm": "-timm.safetensors"}
_FILE: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}

Format = Annotated[
    wire.ExportFormat,
    Query(alias="format", description="onnx: the whole model. timm: a state dict. bundle: as it is stored."),
]
Input = Annotated[
    wire.ExportInput, Query(alias="input", description="Input of the ONNX model: uint8 pictures, or normalised floats.")
]


class TemporaryFile(FileResponse):
    """A file that is deleted once it is sent, or its client is gone."""

    def __init__(self, file: AsyncExitStack, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._file:
            await super().__call__(scope, receive, send)


@router.get("/tasks/{task}/versions/{version}/export", response_class=Response, responses=_FILE)
async def export_version(
    *,
    request: Request,
    services: ServicesOf,
    task: params.TaskOf,
    version: str,
    form: Format = "onnx",
    takes: Input = "uint8",
) -> Response:
    """A version for other tools: an ONNX model, or a timm state dict. It takes seconds; one export runs at a time."""
    if form == "bundle":
        return await download_bundle(services, task, version)
    full = await services.predictor.version_like(task, version)
    bundle = await asyncio.to_thread(services.store.get, task, full)
    async with AsyncExitStack() as stack:
        path, _ = await stack.enter_async_context(receiving.spooled(services.settings.datasets_dir))
        await request.app.state.exports.run(services.tenant, partial(services.export, bundle, form, takes, path))
        name = f"{task}-{full[:12]}{_ENDINGS[form]}"
        made = formatdate(bundle.manifest.created_at, usegmt=True)
        headers = {"Lensrack-Version": full, "ETag": f'"{full}-{form}-{takes}"', "Last-Modified": made}
        return TemporaryFile(stack.pop_all(), path, filename=name, media_type=MEDIA_TYPE, headers=headers)
