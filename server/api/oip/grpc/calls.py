"""The calls of the protocol: each gets the services of the caller's key, as an HTTP route does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.api.oip import infer, models
from server.api.oip import tensors as oip
from server.api.services import Services
from server.serving.resolver import task_name

from . import tensors
from .messages import message


@dataclass(frozen=True)
class Call:
    """A call's context. `left_s`: seconds to the client's deadline; `key` chooses a canary's side."""

    services: Services
    left_s: float | None
    key: str


Answer = Callable[[Any, Call], Awaitable[Any]]


async def server_live(_: Any, __: Call) -> Any:
    return message("ServerLiveResponse")(live=True)


async def server_ready(_: Any, call: Call) -> Any:
    state = await asyncio.to_thread(call.services.ready)
    return message("ServerReadyResponse")(ready=state.ready)


async def server_metadata(_: Any, __: Call) -> Any:
    return message("ServerMetadataResponse")(**models.server())


async def model_ready(request: Any, call: Call) -> Any:
    await models.find(call.services, infer.ref(request.name, request.version))
    return message("ModelReadyResponse")(ready=True)


async def model_metadata(request: Any, call: Call) -> Any:
    return message("ModelMetadataResponse")(
        **await models.metadata(call.services, infer.ref(request.name, request.version))
    )


async def model_infer(request: Any, call: Call) -> Any:
    ref, outputs = infer.ref(request.model_name, request.model_version), tensors.output_requests(request)
    oip.check_outputs(outputs)
    images = oip.images(tensors.input_tensors(request), call.services.settings.max_images)
    inference = infer.InferRequest(ref, images, outputs, _timeout_us(request, call), call.key)
    result = await infer.answer(call.services, inference)
    return tensors.response(request, result.version, oip.output_tensors(result, outputs))


async def repository_index(_: Any, call: Call) -> Any:
    return message("RepositoryIndexResponse")(models=await models.index(call.services))


async def load(request: Any, call: Call) -> Any:
    await models.load(call.services, infer.ref(_model(request)), dict(request.parameters))
    return message("RepositoryModelLoadResponse")()


async def unload(request: Any, call: Call) -> Any:
    await models.unload(call.services, task_name(_model(request)))
    return message("RepositoryModelUnloadResponse")()


# each call, and the route over HTTP whose scope it needs
CALLS: Final[Mapping[str, tuple[Answer, str, str]]] = {
    "ServerLive": (server_live, "GET", "/v2/health/live"),
    "ServerReady": (server_ready, "GET", "/v2/health/ready"),
    "ServerMetadata": (server_metadata, "GET", "/v2"),
    "ModelReady": (model_ready, "GET", "/v2/models/{task}/ready"),
    "ModelMetadata": (model_metadata, "GET", "/v2/models/{task}"),
    "ModelInfer": (model_infer, "POST", "/v2/models/{task}/infer"),
    "RepositoryIndex": (repository_index, "POST", "/v2/repository/index"),
    "RepositoryModelLoad": (load, "POST", "/v2/repository/models/{task}/load"),
    "RepositoryModelUnload": (unload, "POST", "/v2/repository/models/{task}/unload"),
}


def _model(request: Any) -> str:
    """KServe's message has the model's name where Triton's has the repository's, of which there is one."""
    return str(request.model_name or request.repository_name)


def _timeout_us(request: Any, call: Call) -> int:
    """The shorter of the client's deadline and its parameter `timeout`; 0 for neither."""
    timeout = tensors.whole(request.parameters, "timeout")
    left = max(1, int(call.left_s * infer.MICROSECONDS)) if call.left_s is not None else 0
    return min(timeout or left, left or timeout)
