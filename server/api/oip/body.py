"""The body of an inference over HTTP: JSON, then the bytes of tensors that are not in the JSON.

    {"inputs": [{"name", "shape", "datatype", "parameters": {"binary_data_size": 9}}], …} 0x01 0x02 …
    └───────────── Inference-Header-Content-Length ──────────────────────────────────────┘└── 9 ────

The tensors' bytes are in the order of the inputs. Their declared sizes must match the body to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from starlette.datastructures import Headers
from starlette.responses import Response

from server.api import problems
from server.errors import BadRequest, Unprocessable
from server.serving.decoding import Image

from .tensors import OUTPUTS, InputTensor, OutputRequest, OutputTensor, check_outputs, images

LENGTH: Final = "Inference-Header-Content-Length"

Parameters = dict[str, StrictBool | StrictInt | StrictFloat | StrictStr | list[Any] | dict[str, Any] | None]


class _Part(BaseModel):
    """Unknown members and parameters are ignored, as extensions of the protocol add them."""

    model_config = ConfigDict(extra="ignore")

    parameters: Parameters = {}

    def whole(self, name: str) -> int:
        """Return a parameter that is a whole number, 0 where it is left out. Raises Unprocessable."""
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
    outputs: list[OutputRequest]
    timeout_us: int


def header_length(headers: Headers, body: bytes) -> int:
    """Return how many bytes of the body are JSON. Raises BadRequest."""
    header = headers.get(LENGTH)
    if header is None:
        return len(body)
    if not (header.isascii() and header.isdecimal() and len(header) < 19) or int(header) > len(body):
        raise BadRequest(f"{LENGTH}: expected a number up to the body's {len(body)} bytes, got {header[:40]!r}")
    return int(header)


def parse(body: bytes, length: int, max_images: int) -> ParsedRequest:
    """`length`: of the JSON. Raises BadRequest, Unprocessable."""
    request = problems.parse_json(_Request, body[:length])
    tensors = _input_tensors(request.inputs, memoryview(body)[length:])
    outputs = _output_requests(request)
    check_outputs(outputs)
    return ParsedRequest(request.id, images(tensors, max_images), outputs, request.whole("timeout"))


def _input_tensors(inputs: Sequence[_Input], raw: memoryview) -> list[InputTensor]:
    tensors, at = [], 0
    for entry in inputs:
        entry.check_shared_memory()
        data = None
        if "binary_data_size" in entry.parameters:
            size = entry.whole("binary_data_size")
            if size > len(raw) - at:
                detail = f"binary_data_size is {size}, {len(raw) - at} bytes are left of the body"
                raise BadRequest(f"input {entry.name[:100]!r}: {detail}")
            data, at = raw[at : at + size], at + size
        tensors.append(InputTensor(entry.name, entry.datatype, tuple(entry.shape), data, entry.data))
    if at != len(raw):
        raise BadRequest(f"expected {at} bytes after the JSON, as the inputs say, got {len(raw)}")
    return tensors


def _output_requests(request: _Request) -> list[OutputRequest]:
    binary = request.flag("binary_data_output", False)
    if not request.outputs:
        return [OutputRequest(name, binary=binary) for name in OUTPUTS]
    for output in request.outputs:
        output.check_shared_memory()
    return [
        OutputRequest(output.name, output.whole("classification"), output.flag("binary_data", binary))
        for output in request.outputs
    ]


def respond(members: dict[str, Any], tensors: Sequence[OutputTensor], headers: dict[str, str]) -> Response:
    """Return the response. `members`: of its JSON, beside the outputs."""
    raw = [tensor.raw() if tensor.binary else b"" for tensor in tensors]
    outputs = [_output(tensor, len(bytes_)) for tensor, bytes_ in zip(tensors, raw, strict=True)]
    head = json.dumps({**members, "outputs": outputs}, ensure_ascii=False).encode()
    if not any(tensor.binary for tensor in tensors):
        return Response(head, 200, headers, "application/json")
    return Response(b"".join((head, *raw)), 200, {**headers, LENGTH: str(len(head))}, "application/octet-stream")


def _output(tensor: OutputTensor, size: int) -> dict[str, Any]:
    output = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    return {**output, "parameters": {"binary_data_size": size}} if tensor.binary else {**output, "data": tensor.data()}
