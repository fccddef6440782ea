"""A checkpoint of one or several files, as arrays by name.

What a file is, its first bytes say: a file of `torch.save`, a safetensors file, or JSON. Names are taken as the
training script wrote them, without what wrappers put before them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from . import torch_file
from .arrays import BFLOAT16, KINDS, Array
from .pickled import plain
from .refusal import refused, shown

MAX_FILES: Final = 8
MAX_ARRAYS: Final = 20_000
MAX_DEPTH: Final = 8
MAX_VALUES: Final = 100_000  # a dict that is held a thousand times, by dicts that are held a thousand times, …
MAX_CONFIG_BYTES: Final = 2**20
_STATES: Final = ("model", "state_dict")  # where scripts put the parameters beside an optimiser's and others
_WRAPPERS: Final = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+")
_SAFETENSORS: Final = {
    **{"F16": "float16", "F32": "float32", "F64": "float64", "BF16": BFLOAT16, "BOOL": "bool"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8"},
}


@dataclass(frozen=True)
class Checkpoint:
    """Arrays by name, what JSON files say, by file name, and the sha256 of all files."""

    arrays: Mapping[str, Array]
    configs: Mapping[str, Mapping[str, Any]]
    sha256: str

    @classmethod
    def read(cls, files: Sequence[tuple[str, BinaryIO]]) -> Checkpoint:
        """Files by name, which must stay open for as long as arrays are read. Raises Unprocessable (bad_checkpoint)."""
        if not 1 <= len(files) <= MAX_FILES:
            raise refused(f"expected 1 to {MAX_FILES} files, got {len(files)}")
        arrays: dict[str, Array] = {}
        configs: dict[str, Mapping[str, Any]] = {}
        for name, file in files:
            file.seek(0)
            head = file.read(16)
            if head.lstrip()[:1] == b"{":
                configs[name] = _json(name, file)
                continue
            for key, array in (_torch(file) if _is_torch(head) else _safetensors(file)).items():
                if key in arrays:
                    raise refused(f"expected each array once, got {shown(key)} in several files")
                arrays[key] = array
        return cls(arrays, configs, _digest(files))

    def floats(self, name: str) -> NDArray[np.float32]:
        """An array that must be there, as float32."""
        if name not in self.arrays:
            raise refused(f"expected an array {name!r}, got none of that name among {self.told}")
        return self.arrays[name].floats(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.arrays[name].shape if name in self.arrays else None

    @property
    def told(self) -> str:
        """The names of the first few arrays, for a message."""
        first = ", ".join(shown(name) for name in sorted(self.arrays)[:5])
        return f"{len(self.arrays)} arrays" + (f" ({first}{', …' if len(self.arrays) > 5 else ''})" if first else "")


def _is_torch(head: bytes) -> bool:
    return head.startswith((torch_file.ZIP, b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and not (
        head[8:9] == b"{" and head[2:8].strip(b"\0") == b""  # a safetensors header of such a length
    )


def _torch(file: BinaryIO) -> dict[str, Array]:
    value = plain(torch_file.read(file))
    if not isinstance(value, dict):
        raise refused(f"expected a dict of arrays, got {shown(value)}")
    inner = next((state for name in _STATES if isinstance(state := plain(value.get(name)), dict)), value)
    found: dict[str, Array] = {}
    for key, array in _flat(inner, "", 0, iter(range(MAX_VALUES))):
        if len(found) >= MAX_ARRAYS:
            raise refused(f"expected at most {MAX_ARRAYS} arrays, got more")
        found[_WRAPPERS.sub("", key)] = array
    return found


def _flat(value: dict[Any, Any], before: str, depth: int, budget: Iterator[int]) -> Iterator[tuple[str, Array]]:
    """Arrays of dicts within dicts, by dotted names. What else there is says nothing about a task."""
    if depth >= MAX_DEPTH:
        raise refused(f"expected dicts within dicts at most {MAX_DEPTH} deep, got deeper")
    for key, held in value.items():
        own = plain(held)
        if next(budget, None) is None:
            raise refused(f"expected at most {MAX_VALUES} values in dicts within dicts, got more")
        if isinstance(own, Array):
            yield f"{before}{key}", own
        elif isinstance(own, dict):
            yield from _flat(own, f"{before}{key}.", depth + 1, budget)


def _safetensors(file: BinaryIO) -> dict[str, Array]:
    file.seek(0)
    try:
        entries = deserialize(file.read())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise refused(f"expected a file of torch.save or safetensors, got neither ({error})") from error
    return {_WRAPPERS.sub("", name): _entry(name, own) for name, own in entries}


def _entry(name: str, own: Mapping[str, Any]) -> Array:
    if own["dtype"] not in _SAFETENSORS:
        raise refused(f"{shown(name)}: expected one of {', '.join(_SAFETENSORS)}, got {shown(own['dtype'])}")
    kind = _SAFETENSORS[own["dtype"]]
    return Array(kind, tuple(own["shape"]), partial(np.frombuffer, own["data"], KINDS[kind]))


def _json(name: str, file: BinaryIO) -> Mapping[str, Any]:
    file.seek(0)
    text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise refused(f"{shown(name)}: expected at most {MAX_CONFIG_BYTES} bytes of JSON, got more")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(f"{shown(name)}: expected JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise refused(f"{shown(name)}: expected an object, got {shown(value)}")
    return value


def _digest(files: Sequence[tuple[str, BinaryIO]]) -> str:
    """Over the contents in the order of their own digests: what files are called, and come first, changes nothing."""
    found = []
    for _, file in files:
        file.seek(0)
        found.append(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]  # BytesIO and files do
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()
