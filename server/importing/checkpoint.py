"""A checkpoint of one or several files, as arrays by name.

A file's first bytes tell whether it is of `torch.save`, safetensors, or JSON. Names are those of the training script,
without the prefixes of what it wrapped the model in: DataParallel, torch.compile, PEFT, a LightningModule's attribute,
a model of transformers. A file in which two arrays have the same name without them is refused.
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
from .refusal import quoted, refusal

MAX_FILES: Final = 8
MAX_ARRAYS: Final = 20_000
MAX_DEPTH: Final = 8
MAX_VALUES: Final = 100_000  # visited: dicts may share dicts that share dicts, …
MAX_CONFIG_BYTES: Final = 2**20
_STATES: Final = ("model", "state_dict", "model_state_dict")  # keys under which scripts store the parameters
_WRAPPERS: Final = re.compile(
    r"^((module|_orig_mod|base_model\.model|model|net|network|backbone|timm_model|vit|deit)\.)+(?=.)"
)
_SAFETENSORS: Final = {
    **{"F16": "float16", "F32": "float32", "F64": "float64", "BF16": BFLOAT16, "BOOL": "bool"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8"},
}


@dataclass(frozen=True)
class Checkpoint:
    """Arrays by name, the contents of JSON files by file name, and a sha256 over all files.

    `sources`: the arrays' names in the files, with the wrappers' prefixes."""

    arrays: Mapping[str, Array]
    configs: Mapping[str, Mapping[str, Any]]
    sha256: str
    sources: Mapping[str, str]

    @classmethod
    def read(cls, files: Sequence[tuple[str, BinaryIO]]) -> Checkpoint:
        """Read a checkpoint. Its files must stay open while arrays are read. Raises Unprocessable bad_checkpoint."""
        if not 1 <= len(files) <= MAX_FILES:
            raise refusal(f"expected 1 to {MAX_FILES} files, got {len(files)}")
        arrays: dict[str, Array] = {}
        sources: dict[str, str] = {}
        configs: dict[str, Mapping[str, Any]] = {}
        for name, file in files:
            file.seek(0)
            head = file.read(16)
            if head.lstrip()[:1] == b"{":
                configs[name] = _json(name, file)
                continue
            own: dict[str, str] = {}
            for source, array in (_torch(file) if _is_torch(head) else _safetensors(file)).items():
                key = _WRAPPERS.sub("", source)
                if key in own:
                    raise refusal(f"expected one model, got two arrays {quoted(key)}: {own[key]!r} and {source!r}")
                if key in arrays:
                    raise refusal(f"expected each array once, got {quoted(key)} in several files")
                own[key], arrays[key] = source, array
            sources |= own
        return cls(arrays, configs, _digest(files), sources)

    def floats(self, name: str) -> NDArray[np.float32]:
        """The array of this name, as float32. Raises Unprocessable bad_checkpoint."""
        if name not in self.arrays:
            raise refusal(f"expected an array {name!r}, got {self.summary}")
        return self.arrays[name].floats(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.arrays[name].shape if name in self.arrays else None

    @property
    def summary(self) -> str:
        """The number of arrays and the first few names, for a message."""
        first = ", ".join(quoted(name) for name in sorted(self.arrays)[:5])
        return f"{len(self.arrays)} arrays" + (f" ({first}{', …' if len(self.arrays) > 5 else ''})" if first else "")


def _is_torch(head: bytes) -> bool:
    return head.startswith((torch_file.ZIP, b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and not (
        head[8:9] == b"{" and head[2:8].strip(b"\0") == b""  # a safetensors header whose length looks like a pickle
    )


def _torch(file: BinaryIO) -> dict[str, Array]:
    value = plain(torch_file.read(file))
    if not isinstance(value, dict):
        raise refusal(f"expected a dict of arrays, got {quoted(value)}")
    inner = next((state for name in _STATES if isinstance(state := plain(value.get(name)), dict)), value)
    arrays: dict[str, Array] = {}
    for key, array in _flat(inner, "", 0, iter(range(MAX_VALUES))):
        if len(arrays) >= MAX_ARRAYS:
            raise refusal(f"expected at most {MAX_ARRAYS} arrays, got more")
        arrays[key] = array
    return arrays


def _flat(value: dict[Any, Any], prefix: str, depth: int, budget: Iterator[int]) -> Iterator[tuple[str, Array]]:
    """The arrays in nested dicts, by dotted names; all other values are ignored."""
    if depth >= MAX_DEPTH:
        raise refusal(f"expected nested dicts at most {MAX_DEPTH} deep, got deeper")
    for key, wrapped in value.items():
        item = plain(wrapped)
        if next(budget, None) is None:
            raise refusal(f"expected at most {MAX_VALUES} values in nested dicts, got more")
        if isinstance(item, Array):
            yield f"{prefix}{key}", item
        elif isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.", depth + 1, budget)


def _safetensors(file: BinaryIO) -> dict[str, Array]:
    file.seek(0)
    try:
        entries = deserialize(file.read())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise refusal(f"expected a file of torch.save or safetensors, got neither ({error})") from error
    return {name: _entry(name, entry) for name, entry in entries}


def _entry(name: str, entry: Mapping[str, Any]) -> Array:
    if entry["dtype"] not in _SAFETENSORS:
        raise refusal(f"{quoted(name)}: expected one of {', '.join(_SAFETENSORS)}, got {quoted(entry['dtype'])}")
    kind = _SAFETENSORS[entry["dtype"]]
    return Array(kind, tuple(entry["shape"]), partial(np.frombuffer, entry["data"], KINDS[kind]))


def _json(name: str, file: BinaryIO) -> Mapping[str, Any]:
    file.seek(0)
    text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise refusal(f"{quoted(name)}: expected at most {MAX_CONFIG_BYTES} bytes of JSON, got more")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{quoted(name)}: expected JSON, got {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise refusal(f"{quoted(name)}: expected an object, got {quoted(value)}")
    return value


def _digest(files: Sequence[tuple[str, BinaryIO]]) -> str:
    """A sha256 over the files' contents, independent of their names and order."""
    digests = []
    for _, file in files:
        file.seek(0)
        digests.append(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]  # BytesIO and files do
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
