"""The body of an inference over HTTP: JSON, and behind it the bytes of tensors that are not in the JSON.

    {"inputs": [{"name", "shape", "datatype", "parameters": {"binary_data_size": 9}}], …} 0x01 0x02 …
    └───────────── Inference-Header-Content-Length ──────────────────────────────────────┘└── 9 ────

The tensors' bytes lie in the order of the inputs. What is told of their sizes must be what is there, to the byte.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from starlette.datastructures import Headers
from starlette.responses import Response

from server.api import problems
from server.errors import BadRequest, TooLarge, Unprocessable, UnsupportedMedia
from server.serving.decoding import Image

from .tensors import OUTPUTS, InputTensor, OutputRequest, OutputTensor, check_outputs, images

LENGTH: Final = "Inference-Header-Content-Length"
_INFLATED: Final = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

Parameters = dict[str, StrictBool | StrictInt | StrictFloat | StrictStr | list[Any] | dict[str, Any] | None]


class _Part(BaseModel):
    """Members and parameters that we do not know are nobody's mistake: the protocol is extended by them."""

    model_config = ConfigDict(extra="ignore")

    parameters: Parameters = {}

    def whole(self, name: str) -> int:
        """A parameter that is a number, 0 where it is left out. Raises Unprocessable."""
        value = self.parameters.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise Unprocessable(f"parameters.{name}: expected a whole number of 0 or more, got {str(value)[:40]}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.parameters.get(name, default)
        if not isinstance(value, bool):
            raise Unprocessable(f"parameters.{name}: expected true or false, got {str(value)[:40]}")
        return value

    def check_shared_memory(self) -> None:
        if any(name.startswith("shared_memory_") for name in self.parameters):
            raise Unprocessable("parameters.shared_memory_region: expected data in the body, shared memory is not used")


class _Input(_Part):
    name: StrictStr
    datatype: StrictStr
    shape: list[Annotated[StrictInt, Field(ge=0, lt=2**63)]] = Field(max_length=16)
    data: list[Any] | None = None


class _Output(_Part):
    name: StrictStr


class _Request(_Part):
    id: StrictStr = Field("", max_length=1000)
    inputs: list[_Input] = Field(max_length=100)
    outputs: list[_Output] | None = Field(None, max_length=100)


@dataclass(frozen=True)
class ParsedRequest:
    id: str
    images: list[Image]
    wanted: list[OutputRequest]
    timeout_us: int


def inflated(body: bytes, encoding: str, cap: int) -> bytes:
    """A body as it was before it was compressed. Raises UnsupportedMedia, BadRequest, TooLarge."""
    if encoding not in _INFLATED:
        raise UnsupportedMedia(f"Content-Encoding: expected gzip or deflate, got {encoding[:40]!r}")
    unpacking = zlib.decompressobj(_INFLATED[encoding])
    try:
        whole = unpacking.decompress(body, cap + 1)
    except zlib.error as error:
        raise BadRequest(f"Content-Encoding: expected a body of {encoding}, got something else") from error
    if len(whole) > cap:
        raise TooLarge(f"expected a body of at most {cap} bytes once it is unpacked, got more")
    if not unpacking.eof or unpacking.unused_data:
        raise BadRequest(f"Content-Encoding: expected one whole body of {encoding}, got a part or more")
    return whole


def header_length(headers: Headers, body: bytes) -> int:
    """How many bytes of the body are JSON. Raises BadRequest."""
    told = headers.get(LENGTH)
    if told is None:
        return len(body)
    if not (told.isascii() and told.isdecimal() and len(told) < 19) or int(told) > len(body):
        raise BadRequest(f"{LENGTH}: expected a number up to the body's {len(body)} bytes, got {told[:40]!r}")
    return int(told)


def parse(body: bytes, length: int, max_images: int) -> ParsedRequest:
    """`length`: of the JSON. Raises BadRequest, Unprocessable."""
    asked = problems.parse_json(_Request, body[:length])
    given = _given(asked.inputs, memoryview(body)[length:])
    wanted = _wanted(asked)
    check_outputs(wanted)
    return ParsedRequest(asked.id, images(given, max_images), wanted, asked.whole("timeout"))


def _given(told: Sequence[_Input], raw: memoryview) -> list[InputTensor]:
    found, at = [], 0
    for one in told:
        one.check_shared_memory()
        mine = None
        if "binary_data_size" in one.parameters:
            size = one.whole("binary_data_size")
            if size > len(raw) - at:
                detail = f"binary_data_size is {size}, {len(raw) - at} bytes are left of the body"
                raise BadRequest(f"input {one.name[:100]!r}: {detail}")
            mine, at = raw[at : at + size], at + size
        found.append(InputTensor(one.name, one.datatype, tuple(one.shape), mine, one.data))
    if at != len(raw):
        raise BadRequest(f"expected {at} bytes behind the JSON, as the inputs say, got {len(raw)}")
    return found


def _wanted(asked: _Request) -> list[OutputRequest]:
    binary = asked.flag("binary_data_output", False)
    if not asked.outputs:
        return [OutputRequest(name, binary=binary) for name in OUTPUTS]
    for one in asked.outputs:
        one.check_shared_memory()
    return [
        OutputRequest(one.name, one.whole("classification"), one.flag("binary_data", binary)) for one in asked.outputs
    ]


def respond(about: dict[str, Any], told: Sequence[OutputTensor], headers: dict[str, str]) -> Response:
    """`about`: the members of the answer beside its outputs."""
    raw = [one.raw() if one.binary else b"" for one in told]
    outputs = [_listed(one, len(bytes_)) for one, bytes_ in zip(told, raw, strict=True)]
    head = json.dumps({**about, "outputs": outputs}, ensure_ascii=False).encode()
    if not any(one.binary for one in told):
        return Response(head, 200, headers, "application/json")
    return Response(b"".join((head, *raw)), 200, {**headers, LENGTH: str(len(head))}, "application/octet-stream")


def _listed(one: OutputTensor, size: int) -> dict[str, Any]:
    told = {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
    return {**told, "parameters": {"binary_data_size": size}} if one.binary else {**told, "data": one.data()}
