"""Tensors in and out, as raw bytes (little-endian, row-major) or as lists of values.

    image   BYTES [N]            encoded pictures: files in raw bytes, base64 text in JSON
    pixels  UINT8 [N, H, W, 3]   decoded pictures of any size, cut as encoded ones are
    tensor  FP32  [N, 3, S, S]   what the network takes, normalised by the client
                                             one of these ─► images ─► predictor ─► outputs
    logits, probabilities  FP32 [N, C]       label  BYTES [N], the best of each picture

BYTES elements lie in raw bytes one behind the other, each behind its length in four bytes: the binary tensor
data extension.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from server.errors import BadRequest, Unprocessable
from server.serving.answers import Outputs
from server.serving.decoding import DecodedImage, Image, NormalisedImage

Shape = tuple[int, ...]
Values = npt.NDArray[np.float32] | list[bytes]


@dataclass(frozen=True)
class TensorSpec:
    """How an input or output looks; -1 is a side that differs from request to request."""

    datatype: str
    shape: Shape


def inputs(size: int) -> dict[str, TensorSpec]:
    """`size`: the side S of what the network takes."""
    tensor = TensorSpec("FP32", (-1, 3, size, size))
    return {"image": TensorSpec("BYTES", (-1,)), "pixels": TensorSpec("UINT8", (-1, -1, -1, 3)), "tensor": tensor}


def outputs(classes: int) -> dict[str, TensorSpec]:
    numbers = TensorSpec("FP32", (-1, classes))
    return {"logits": numbers, "probabilities": numbers, "label": TensorSpec("BYTES", (-1,))}


INPUTS: Final = {name: form.datatype for name, form in inputs(-1).items()}
OUTPUTS: Final = tuple(outputs(-1))


# --- in ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputTensor:
    """An input of a request: `raw` bytes, or `data`, flat or nested as the shape says."""

    name: str
    datatype: str
    shape: Shape
    raw: memoryview | None = None
    data: Sequence[Any] | None = None


def images(tensors: Sequence[InputTensor], max_images: int) -> list[Image]:
    """Return a request's images. Raises BadRequest where bytes and shape disagree, Unprocessable for a wrong input."""
    if len(tensors) != 1:
        raise Unprocessable(f"inputs: expected one of {', '.join(INPUTS)}, got {len(tensors)} inputs")
    [tensor] = tensors
    _check(tensor, max_images)
    if (tensor.raw is None) == (tensor.data is None):
        how = "no data" if tensor.raw is None else "data twice, as values and as bytes"
        raise BadRequest(f"input {tensor.name!r}: expected its data once, got {how}")
    return _READERS[tensor.datatype](tensor)


def _check(tensor: InputTensor, max_images: int) -> None:
    name = tensor.name[:100]
    if tensor.name not in INPUTS:
        raise Unprocessable(f"inputs: expected one of {', '.join(INPUTS)}, got {name!r}")
    expected, form = INPUTS[tensor.name], inputs(-1)[tensor.name]
    if tensor.datatype != expected:
        raise Unprocessable(f"input {name!r}: expected datatype {expected}, got {tensor.datatype[:20]!r}")
    single = tensor.datatype == "BYTES" and tensor.shape[1:] == (1,)  # a batch of one-element lists
    shape = tensor.shape[:1] if single else tensor.shape
    if len(shape) != len(form.shape) or any(b not in (-1, a) for a, b in zip(shape, form.shape, strict=True)):
        raise Unprocessable(f"input {name!r}: expected shape {list(form.shape)}, got {list(tensor.shape[:10])}")
    if min(shape) < 1 or shape[0] > max_images:
        expects = f"sides of 1 or more, and the first, the number of images, up to {max_images}"
        raise Unprocessable(f"input {name!r}: expected {expects}, got {list(tensor.shape)}")


def _files(tensor: InputTensor) -> list[Image]:
    if tensor.raw is not None:
        return [*_elements(tensor, tensor.raw)]
    return [_encoded(element, at) for at, element in enumerate(_flat(tensor))]


def _elements(tensor: InputTensor, raw: memoryview) -> list[bytes]:
    """BYTES elements, each behind its length."""
    elements: list[bytes] = []
    at, count = 0, math.prod(tensor.shape)
    for _ in range(count):
        if len(raw) - at < 4:
            raise BadRequest(f"input {tensor.name!r}: expected {count} elements, its bytes end after {len(elements)}")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if len(raw) - at < length:
            raise BadRequest(
                f"input {tensor.name!r}: element {len(elements)} has {length} bytes, {len(raw) - at} are there"
            )
        elements.append(bytes(raw[at : at + length]))
        at += length
    if at != len(raw):
        raise BadRequest(f"input {tensor.name!r}: {len(raw) - at} bytes are left after its {count} elements")
    return elements


def _encoded(element: object, at: int) -> bytes:
    """A picture in a list: bytes in gRPC, where a list can hold them, and base64 in JSON."""
    if isinstance(element, bytes):
        return element
    if not isinstance(element, str):
        raise Unprocessable(f"element {at}: expected base64 text, got {type(element).__name__}")
    try:
        return base64.b64decode(element, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"element {at}: expected base64 (RFC 4648, padded), got {element[:40]!r}") from error


def _pixels(tensor: InputTensor) -> list[Image]:
    if tensor.raw is not None:
        return [DecodedImage(pixels) for pixels in _shaped(tensor, tensor.raw, np.dtype(np.uint8))]
    numbers = _numbers(tensor)
    if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
        raise Unprocessable(f"input {tensor.name!r}: expected whole numbers from 0 to 255, got others")
    return [DecodedImage(pixels) for pixels in numbers.astype(np.uint8).reshape(tensor.shape)]


def _tensors(tensor: InputTensor) -> list[Image]:
    if tensor.raw is not None:
        return [
            NormalisedImage(values.astype(np.float32)) for values in _shaped(tensor, tensor.raw, np.dtype("<f4"))
        ]  # now aligned
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        return [NormalisedImage(values) for values in _numbers(tensor).astype(np.float32).reshape(tensor.shape)]


def _shaped(tensor: InputTensor, raw: memoryview, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    expected = math.prod(tensor.shape) * dtype.itemsize
    if len(raw) != expected:
        detail = f"shape {list(tensor.shape)} of {tensor.datatype} takes {expected} bytes, got {len(raw)}"
        raise BadRequest(f"input {tensor.name!r}: {detail}")
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


def _numbers(tensor: InputTensor) -> npt.NDArray[np.float64]:
    try:
        return np.frombuffer(array("d", _flat(tensor)), np.float64)
    except (TypeError, OverflowError) as error:
        raise Unprocessable(f"input {tensor.name!r}: expected numbers, got something else among them") from error


def _flat(tensor: InputTensor) -> Sequence[Any]:
    """The values in row-major order. Raises BadRequest where there are more or fewer than the shape says."""
    data = tensor.data or ()
    for side in tensor.shape[1:]:
        if not any(isinstance(part, list) for part in data):
            break
        if not all(isinstance(part, list) and len(part) == side for part in data):
            raise BadRequest(f"input {tensor.name!r}: its data is not nested as its shape {list(tensor.shape)} says")
        data = list(chain.from_iterable(data))
    if len(data) != math.prod(tensor.shape):
        detail = f"shape {list(tensor.shape)} has {math.prod(tensor.shape)} values, got {len(data)}"
        raise BadRequest(f"input {tensor.name!r}: {detail}")
    return data


_READERS: Final[Mapping[str, Callable[[InputTensor], list[Image]]]] = {
    "BYTES": _files,
    "UINT8": _pixels,
    "FP32": _tensors,
}


# --- out --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputRequest:
    """A requested output; with `classes` above 0, so many `score:index:label` instead (classification extension), best
    first."""

    name: str
    classes: int = 0
    binary: bool = False


@dataclass(frozen=True)
class OutputTensor:
    name: str
    datatype: str
    shape: Shape
    values: Values
    binary: bool

    def raw(self) -> bytes:
        if isinstance(self.values, list):
            return b"".join(struct.pack("<I", len(element)) + element for element in self.values)
        return self.values.astype("<f4").tobytes()

    def data(self) -> list[Any]:
        """For JSON: row-major."""
        if isinstance(self.values, list):
            return [element.decode() for element in self.values]
        return list(self.values.ravel().tolist())


def check_outputs(requested: Sequence[OutputRequest]) -> None:
    """Before anything is computed. Raises Unprocessable."""
    for output in requested:
        if output.name not in OUTPUTS:
            raise Unprocessable(f"outputs: expected some of {', '.join(OUTPUTS)}, got {output.name[:100]!r}")
        if output.classes < 0 or (output.classes and output.name == "label"):
            expected = "classes of logits or probabilities, as a number of 0 or more"
            raise Unprocessable(f"output {output.name!r}: expected {expected}, got {output.classes}")
    if len({output.name for output in requested}) < len(requested):
        raise Unprocessable("outputs: expected each once")


def output_tensors(outputs_: Outputs, requested: Sequence[OutputRequest]) -> list[OutputTensor]:
    return [_output_tensor(outputs_, output) for output in requested]


def _output_tensor(outputs_: Outputs, output: OutputRequest) -> OutputTensor:
    images = len(outputs_.logits)
    if output.name == "label":
        best = [outputs_.labels[index].encode() for index in outputs_.probabilities.argmax(axis=1)]
        return OutputTensor(output.name, "BYTES", (images,), best, output.binary)
    numbers = outputs_.logits if output.name == "logits" else outputs_.probabilities
    if output.classes:
        count = min(output.classes, len(outputs_.labels))
        ranked = [text for row in numbers for text in _ranked(row, outputs_.labels, count)]
        return OutputTensor(output.name, "BYTES", (images, count), ranked, output.binary)
    return OutputTensor(output.name, "FP32", numbers.shape, numbers.astype(np.float32), output.binary)


def _ranked(row: npt.NDArray[np.float64], labels: Sequence[str], count: int) -> list[bytes]:
    order = np.argsort(-row, kind="stable")[:count]
    return [f"{row[index]:f}:{index}:{labels[index]}".encode() for index in order]
