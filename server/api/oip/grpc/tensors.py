"""An inference's messages and the tensors that they mean. What comes raw goes back raw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from server.api.oip.tensors import OUTPUTS, InputTensor, OutputRequest, OutputTensor
from server.errors import BadRequest, Unprocessable

from .messages import message

_CONTENTS: Final = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}
_Response: Final = message("ModelInferResponse")


def given(request: Any) -> list[InputTensor]:
    """Raises BadRequest where raw contents and inputs do not go together, Unprocessable for shared memory."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest(f"raw_input_contents: expected one for each of {len(request.inputs)} inputs, got {len(raw)}")
    return [_given(one, memoryview(raw[at]) if raw else None) for at, one in enumerate(request.inputs)]


def _given(one: Any, raw: memoryview | None) -> InputTensor:
    if any(name.startswith("shared_memory_") for name in one.parameters):
        raise Unprocessable("parameters.shared_memory_region: expected data in the request, shared memory is not used")
    field = _CONTENTS.get(one.datatype)
    data = None
    if one.HasField("contents"):
        others = [each.name for each, _ in one.contents.ListFields() if each.name != field]
        if others:
            raise BadRequest(f"input {one.name[:100]!r}: expected contents.{field}, got contents.{others[0]}")
        data = list(getattr(one.contents, field)) if field else []
    return InputTensor(one.name, one.datatype, tuple(one.shape), raw, data)


def wanted(request: Any) -> list[OutputRequest]:
    """Raises Unprocessable."""
    if not request.outputs:
        return [OutputRequest(name) for name in OUTPUTS]
    return [OutputRequest(one.name, whole(one.parameters, "classification")) for one in request.outputs]


def whole(parameters: Any, name: str) -> int:
    """A parameter that is a number, 0 where it is left out. Raises Unprocessable."""
    if name not in parameters:
        return 0
    one = parameters[name]
    value = getattr(one, one.WhichOneof("parameter_choice") or "string_param")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Unprocessable(f"parameters.{name}: expected a whole number of 0 or more, got {str(value)[:40]}")
    return value


def response(request: Any, version: str, told: Sequence[OutputTensor]) -> Any:
    found = _Response(model_name=request.model_name, model_version=version, id=request.id)
    for one in told:
        output = found.outputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
        if request.raw_input_contents:
            found.raw_output_contents.append(one.raw())
        elif isinstance(one.values, list):
            output.contents.bytes_contents.extend(one.values)
        else:
            output.contents.fp32_contents.extend(one.values.ravel().tolist())
    return found
