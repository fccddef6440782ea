"""Messages of an inference to tensors and back. A request with raw contents gets raw contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from server.api.oip.tensors import OUTPUTS, InputTensor, OutputRequest, OutputTensor
from server.errors import BadRequest, Unprocessable

from .messages import message

_CONTENTS: Final = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}
_Response: Final = message("ModelInferResponse")


def input_tensors(request: Any) -> list[InputTensor]:
    """Raises BadRequest where raw contents and inputs do not match, Unprocessable for shared memory."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest(f"raw_input_contents: expected one for each of {len(request.inputs)} inputs, got {len(raw)}")
    return [_input_tensor(tensor, memoryview(raw[at]) if raw else None) for at, tensor in enumerate(request.inputs)]


def _input_tensor(tensor: Any, raw: memoryview | None) -> InputTensor:
    if any(name.startswith("shared_memory_") for name in tensor.parameters):
        raise Unprocessable("parameters.shared_memory_region: expected data in the request, shared memory is not used")
    field = _CONTENTS.get(tensor.datatype)
    data = None
    if tensor.HasField("contents"):
        others = [other.name for other, _ in tensor.contents.ListFields() if other.name != field]
        if others:
            raise BadRequest(f"input {tensor.name[:100]!r}: expected contents.{field}, got contents.{others[0]}")
        data = list(getattr(tensor.contents, field)) if field else []
    return InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), raw, data)


def output_requests(request: Any) -> list[OutputRequest]:
    """Raises Unprocessable."""
    if not request.outputs:
        return [OutputRequest(name) for name in OUTPUTS]
    return [OutputRequest(output.name, whole(output.parameters, "classification")) for output in request.outputs]


def whole(parameters: Any, name: str) -> int:
    """Return a parameter that is a whole number, 0 where it is left out. Raises Unprocessable."""
    if name not in parameters:
        return 0
    parameter = parameters[name]
    value = getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Unprocessable(f"parameters.{name}: expected a whole number of 0 or more, got {str(value)[:40]}")
    return value


def response(request: Any, version: str, tensors: Sequence[OutputTensor]) -> Any:
    message_ = _Response(model_name=request.model_name, model_version=version, id=request.id)
    for tensor in tensors:
        output = message_.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if request.raw_input_contents:
            message_.raw_output_contents.append(tensor.raw())
        elif isinstance(tensor.values, list):
            output.contents.bytes_contents.extend(tensor.values)
        else:
            output.contents.fp32_contents.extend(tensor.values.ravel().tolist())
    return message_
