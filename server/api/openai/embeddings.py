"""Embeddings of pictures: the frozen backbone's features, which belong to no task."""

from __future__ import annotations

import base64
import binascii
import re
from functools import partial
from typing import Annotated, Any, Final, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from server.api import problems
from server.api.routes import predict
from server.api.services import ServicesOf
from server.errors import Unprocessable
from server.serving.answers import Features

from . import bodies
from .faults import RESPONSES
from .models import require_backbone

_DATA_URI: Final = re.compile(r"data:[a-z0-9.+/;=-]{0,100};base64,", re.IGNORECASE)  # RFC 2397
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/EmbeddingsRequest"}}},
    }
}

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=RESPONSES)


class EmbeddingsRequest(BaseModel):
    """`user` is accepted and ignored."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    input: StrictStr | Annotated[list[StrictStr], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


# documented, not checked: checking thousands of numbers would cost more than sending them
@router.post("/embeddings", openapi_extra=_BODY, response_model=None, responses={200: {"model": bodies.EmbeddingList}})
async def create_embeddings(request: Request, services: ServicesOf) -> dict[str, Any]:
    """`input`: a picture or several, as base64 or as data URIs."""
    body = await request.body()
    embedding, images = await request.app.state.parsing.run(services.tenant, partial(_read, body))
    await require_backbone(services, embedding.model)
    await services.meter.images(services.key, len(images))
    timeout_s = services.settings.request_timeout_s
    work = services.predictor.embed(images, tenant=services.tenant, timeout_s=timeout_s)
    return _response(embedding, await predict.unless_gone(request, work))


def _read(body: bytes) -> tuple[EmbeddingsRequest, list[bytes]]:
    embedding = problems.parse_json(EmbeddingsRequest, body)
    texts = [embedding.input] if isinstance(embedding.input, str) else embedding.input
    return embedding, [_picture(text, index) for index, text in enumerate(texts)]


def _picture(text: str, index: int) -> bytes:
    if _ADDRESS.match(text):
        raise _refused(index, "a picture's bytes, as this server fetches no URL", text)
    prefix = _DATA_URI.match(text)
    try:
        return base64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(index, "a picture as base64 or as a data URI", text) from error


def _refused(index: int, expected: str, got: str) -> Unprocessable:
    return Unprocessable(f"input.{index}: expected {expected}, got {got[:40]!r}", param="input")


def _response(embedding: EmbeddingsRequest, features: Features) -> dict[str, Any]:
    vectors = features.vectors.astype("<f4")
    if embedding.dimensions not in (None, vectors.shape[1]):
        detail = f"dimensions: expected {vectors.shape[1]}, the feature's length, got {embedding.dimensions}"
        raise Unprocessable(detail, param="dimensions")
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, embedding.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}  # pictures are not counted in tokens
    return {"object": "list", "model": embedding.model, "data": data, "usage": usage}


def _encoded(vector: np.ndarray[Any, Any], encoding: str) -> list[float] | str:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
