"""The bundle: a manifest and named arrays in one safetensors file, whose sha256 is its version.

    build   manifest + tensors ── normalise, check ──► _encode ──► bytes ──► version
    parse   bytes ── sizes, header, layout, numbers, manifest, shapes ──► encode again: the same bytes, or refused

This module writes the file itself, not by the safetensors library: a version is the digest of these bytes, so they must
not change with a library's release. Any safetensors reader can read them. Every refusal is a BundleError.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from prompts_store import names, strict_json
from prompts_store.errors import BundleError, CorruptBundle, excerpt
from prompts_store.manifest import MAX_MANIFEST_BYTES, Manifest

METADATA_KEY: Final = "lensrack"
MAX_BUNDLE_BYTES: Final = 64 * 2**20
MAX_TENSORS: Final = 4096
MAX_DIM: Final = 2**24
# A manifest is a JSON string inside the header, where escaping at most doubles it; 4096 entries take under 1 MiB more.
MAX_HEADER_BYTES: Final = 2 * MAX_MANIFEST_BYTES + 2 * 2**20
_ALIGNMENT: Final = 8
_DTYPES: Final[dict[str, np.dtype[Any]]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_CODES: Final = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Bundle:
    """An immutable bundle, equal to another with the same version; its arrays are read-only views of `data`.

    `tensors` by name, float32 or float16, in the order of the file; `data` is the file, `version` its sha256 in hex.
    """

    manifest: Manifest
    tensors: dict[str, np.ndarray[Any, Any]]
    data: bytes
    version: str

    @classmethod
    def build(cls, manifest: Manifest, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Bundle:
        """Check and encode a bundle; equal content gives equal bytes, whatever the order of `tensors`.

        Raises BundleError for anything that `parse` would refuse.
        """
        arrays = {name: _storable(name, array) for name, array in tensors.items()}
        return cls.parse(_encode(Manifest.from_json(manifest.to_json()), arrays))

    @classmethod
    def parse(cls, data: bytes, *, max_bytes: int = MAX_BUNDLE_BYTES) -> Bundle:
        """Read an untrusted file. Raises BundleError, which names the expected and the actual value."""
        header, body = _split(data, max_bytes)
        manifest = _manifest(header.pop("__metadata__", None))
        tensors = _arrays(header, body)
        _check_shapes(manifest, tensors)
        if _encode(manifest, tensors) != data:
            raise BundleError("bundle: expected the canonical encoding (order, spacing, padding), got another")
        return cls(manifest, tensors, data, hashlib.sha256(data).hexdigest())

    @classmethod
    def verified(cls, data: bytes, *, task: str, version: str) -> Bundle:
        """Read the bytes that a store holds as `version` of `task`. Raises CorruptBundle if they are anything else."""
        digest = hashlib.sha256(data).hexdigest()
        if digest != version:
            raise CorruptBundle(f"task {task}: expected a bundle with digest {version}, stored is {digest}")
        try:
            bundle = cls.parse(data)
        except BundleError as error:
            raise CorruptBundle(f"task {task}, version {version}: {error.detail}") from error
        if bundle.manifest.task != task:
            raise CorruptBundle(f"version {version}: expected a bundle of task {task}, got {bundle.manifest.task}")
        return bundle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bundle) and self.version == other.version

    def __hash__(self) -> int:
        return hash(self.version)


def read_manifest(data: bytes) -> Manifest:
    """Read the manifest from the first `header_bytes` bytes of a bundle. Raises BundleError."""
    return _manifest(_header(data[8 : header_bytes(data)]).pop("__metadata__", None))


def header_bytes(data: bytes) -> int:
    """Return the size in bytes of a bundle's length and header, read from its first 8 bytes. Raises BundleError."""
    if len(data) < 8:
        raise BundleError(f"bundle: expected at least 8 bytes, got {len(data)}")
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise BundleError(f"bundle: expected a header of 2 to {MAX_HEADER_BYTES} bytes, got a length of {length}")
    return 8 + length


# --- writing ----------------------------------------------------------------------------------------------------------


def _storable(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    _check_name(name)
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float16):
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise BundleError(f"tensor {excerpt(name)}: expected a float32 or float16 array, got {got}")
    return array  # its strides do not matter: tobytes writes C order


def _encode(manifest: Manifest, tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Encode float32 before float16, so that every array is aligned; then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: manifest.to_json()}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = _CODES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = strict_json.dumps(header, "bundle header").encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].tobytes() for name in order)])


# --- reading ----------------------------------------------------------------------------------------------------------


def _split(data: bytes, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
    if len(data) > max_bytes:
        raise BundleError(f"bundle: expected at most {max_bytes} bytes, got {len(data)}")
    body = header_bytes(data)
    if body > len(data):
        raise BundleError(f"bundle: expected a header of {body - 8} bytes, got {len(data) - 8}")
    return _header(data[8:body]), memoryview(data)[body:]


def _header(text: bytes) -> dict[str, Any]:
    header = strict_json.loads(text, "bundle header")
    if not isinstance(header, dict):
        raise BundleError(f"bundle header: expected an object, got {excerpt(header)}")
    return header


def _manifest(metadata: Any) -> Manifest:
    if not isinstance(metadata, dict) or list(metadata) != [METADATA_KEY]:
        got = sorted(metadata) if isinstance(metadata, dict) else metadata
        raise BundleError(f"bundle header: expected metadata with the one key {METADATA_KEY!r}, got {excerpt(got)}")
    text = metadata[METADATA_KEY]
    if not isinstance(text, str):
        raise BundleError(f"bundle header: expected the manifest as text, got {excerpt(text)}")
    return Manifest.from_json(text)


def _arrays(header: dict[str, Any], body: memoryview) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays as read-only views of the file, which they must cover without holes or overlaps."""
    if len(header) > MAX_TENSORS:
        raise BundleError(f"bundle: expected at most {MAX_TENSORS} tensors, got {len(header)}")
    entries = sorted((_entry(name, fields) for name, fields in header.items()), key=lambda entry: entry[3:])
    tensors, end = {}, 0
    for name, dtype, shape, begin, stop in entries:
        if begin != end or stop > len(body):
            raise BundleError(
                f"tensor {name}: expected its bytes from {end} and to at most {len(body)}, got {begin} to {stop}"
            )
        end = stop
        tensors[name] = _finite(name, np.frombuffer(body[begin:stop], dtype).reshape(shape))
    if end != len(body):
        raise BundleError(f"bundle: expected {end} bytes of tensors, got {len(body)}")
    return tensors


_Entry = tuple[str, np.dtype[Any], tuple[int, ...], int, int]  # name, dtype, shape, first byte, one past the last


def _entry(name: str, fields: Any) -> _Entry:
    _check_name(name)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"tensor {name}: expected the fields dtype, shape and data_offsets, got {excerpt(fields)}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise BundleError(f"tensor {name}: expected dtype {' or '.join(_DTYPES)}, got {excerpt(code)}")
    if not (_naturals(shape) and 1 <= len(shape) <= 3 and max(shape) <= MAX_DIM):
        raise BundleError(f"tensor {name}: expected 1 to 3 sizes of 0 to {MAX_DIM}, got {excerpt(shape)}")
    if not (_naturals(offsets) and len(offsets) == 2):
        raise BundleError(f"tensor {name}: expected two offsets, got {excerpt(offsets)}")
    needed, got = math.prod(shape) * _DTYPES[code].itemsize, offsets[1] - offsets[0]
    if needed != got:
        raise BundleError(f"tensor {name}: expected {needed} bytes for {code} {shape}, got {got}")
    return name, _DTYPES[code], tuple(shape), offsets[0], offsets[1]


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not names.TENSOR.fullmatch(name) or name == "__metadata__":
        raise BundleError(f"bundle: expected tensor names like {names.TENSOR.pattern}, got {excerpt(name)}")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _finite(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if not np.isfinite(array).all():
        raise BundleError(f"tensor {name}: expected finite numbers, got NaN or infinity")
    return array


def _check_shapes(manifest: Manifest, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Check the tensors against the manifest; the engine checks D, the backbone's width."""
    _check_rows(tensors, "head.weight", 2, len(manifest.labels), "one row for each label")
    _check_rows(tensors, "head.bias", 1, len(manifest.labels), "one number for each label")
    _check_rows(tensors, "prompts", 2, sum(manifest.prompt_lengths), "one row for each prompt, layer after layer")


def _check_rows(tensors: Mapping[str, np.ndarray[Any, Any]], name: str, ndim: int, rows: int, meaning: str) -> None:
    if name in tensors and (tensors[name].ndim != ndim or len(tensors[name]) != rows):
        shape = f"[{rows}, D]" if ndim == 2 else f"[{rows}]"
        raise BundleError(f"tensor {name}: expected {shape} ({meaning}), got {list(tensors[name].shape)}")
