"""One inference of the protocol, over HTTP or gRPC: model and version are a task and one of its versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from server.api.services import Services
from server.serving.answers import Outputs
from server.serving.decoding import Image
from server.serving.resolver import Ref, task_name

from . import tensors

LIVE: Final = "live"  # the version that answers where none is named
MICROSECONDS: Final = 1e6  # in a second: the unit of the parameter `timeout`


@dataclass(frozen=True)
class InferRequest:
    """`outputs`: empty for all. `timeout_us`: the client's, 0 for none. `key` chooses a canary's side."""

    ref: Ref
    images: Sequence[Image]
    outputs: Sequence[tensors.OutputRequest]
    timeout_us: int
    key: str


def ref(model: str, version: str = "") -> Ref:
    """`version`: a digest, the unique beginning of one, or an alias; empty for the live one. Raises BadRequest
    (bad_task_name)."""
    return Ref(task_name(model), version or LIVE)


def timeout_s(services: Services, timeout_us: int) -> float:
    """Return the client's timeout, at most the server's."""
    most = services.settings.request_timeout_s
    return min(most, timeout_us / MICROSECONDS) if timeout_us > 0 else most


async def answer(services: Services, request: InferRequest) -> Outputs:
    """Raises ServiceError kinds and the store's errors, as `Predictor.predict`."""
    await services.meter.images(services.key, len(request.images))
    return await services.predictor.outputs(
        request.ref,
        request.images,
        key=request.key,
        tenant=services.tenant,
        timeout_s=timeout_s(services, request.timeout_us),
    )
