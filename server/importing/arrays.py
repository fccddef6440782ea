"""Arrays of a checkpoint, and the closed table of the functions that a pickle may call to build them.

An array is read from its file on demand, so optimiser state and a frozen backbone enter memory only if they are needed.
The size that an array claims is compared with the bytes in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .pickled import Builder, Call, Name, plain
from .refusal import quoted, refusal

MAX_AXES: Final = 8
BFLOAT16: Final = "bfloat16"
KINDS: Final = {
    **{name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "float64", "int8", "int16")},
    **{name: np.dtype(name).newbyteorder("<") for name in ("int32", "int64", "uint8", "bool")},
    BFLOAT16: np.dtype("<u2"),  # NumPy lacks the type; its bits are the upper half of a float32's
}


@dataclass(frozen=True)
class Array:
    """An array of a checkpoint that `read` loads. `kind` is a key of KINDS."""

    kind: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    def floats(self, name: str) -> NDArray[np.float32]:
        """The numbers as float32; `name` is for the message. Raises Unprocessable for NaN and infinity."""
        raw = self.read()
        wide = (raw.astype("<u4") << 16).view("<f4") if self.kind == BFLOAT16 else raw
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(wide, dtype=np.float32).reshape(self.shape)
        if not np.isfinite(numbers).all():
            raise refusal(f"{quoted(name)}: expected finite numbers, got NaN or infinity")
        return numbers


@dataclass(frozen=True)
class Storage:
    """A torch storage: `count` consecutive numbers in the file. `read(first, stop)` returns the bytes of numbers
    first … stop - 1."""

    kind: str
    count: int
    read: Callable[[int, int], bytes]


STORAGES: Final = {
    Name("torch", f"{word}Storage"): kind
    for word, kind in {
        **{"Float": "float32", "Half": "float16", "BFloat16": BFLOAT16, "Double": "float64", "Bool": "bool"},
        **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    }.items()
}


def strided(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A tensor as a view of a storage. Raises Unprocessable unless it lies within the storage."""
    if not (_naturals((offset,)) and _naturals(shape) and _naturals(strides) and len(shape) == len(strides)):
        raise refusal("a tensor's offset, shape and strides: expected natural numbers, as many strides as sizes")
    stop = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        stop = offset
    if stop > storage.count or math.prod(shape) > storage.count:
        raise refusal(
            f"a tensor of shape {list(shape)}: expected it within its storage of {storage.count} numbers, got more"
        )
    dtype = KINDS[storage.kind]

    def read() -> NDArray[Any]:
        steps = tuple(stride * dtype.itemsize for stride in strides)
        return np.ndarray(shape, dtype, storage.read(offset, stop), strides=steps)

    return Array(storage.kind, shape, read)


def _naturals(values: Any) -> bool:
    if type(values) is not tuple or len(values) > MAX_AXES:
        return False
    return all(type(value) is int and 0 <= value < 2**40 for value in values)


# --- functions that a pickle may call ---------------------------------------------------------------------------------


class _DtypeBuilder(Builder):
    """numpy.dtype('f4'); the byte order comes with its state."""

    def __init__(self, code: str) -> None:
        self._code = code

    def build(self, state: Any) -> np.dtype[Any]:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order not in ("<", "|", ">", "="):
            raise refusal(f"a NumPy dtype's byte order: expected <, > or |, got {quoted(order)}")
        return np.dtype(self._code).newbyteorder("<" if order == "=" else order)


class _NdarrayBuilder(Builder):
    """The numpy.ndarray that `_reconstruct` begins; its state holds the numbers."""

    def build(self, state: Any) -> Array:
        if type(state) is not tuple or len(state) != 5:
            raise refusal("a NumPy array's state: expected (version, shape, dtype, order, bytes), got something else")
        _, shape, dtype, fortran, data = state
        return _array(data, plain(dtype), shape, "F" if fortran is True else "C")


def _dtype(code: object, *_: object) -> _DtypeBuilder:
    if not isinstance(code, str) or code not in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}:
        raise refusal(f"a NumPy array: expected numbers of up to 8 bytes, got dtype {quoted(code)}")
    return _DtypeBuilder(code)


def _array(data: object, dtype: object, shape: object, order: object = "C") -> Array:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise refusal("a NumPy array: expected a dtype and bytes, got something else")
    if type(shape) is not tuple or not _naturals(shape) or math.prod(shape) * dtype.itemsize != len(data):
        size = list(shape) if type(shape) is tuple and _naturals(shape) else quoted(shape)
        raise refusal(f"a NumPy array of shape {size}: expected {dtype} numbers for all of it, got {len(data)} bytes")
    numbers = np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    kind = "bool" if dtype.kind == "b" else dtype.newbyteorder("=").name
    return Array(kind, shape, lambda: numbers)


def _scalar(dtype: object, data: object) -> float:
    numbers = _array(data, dtype, (1,)).read()
    return float(numbers[0])


def _reconstruct(kind: object, *_: object) -> _NdarrayBuilder:
    if kind != Name("numpy", "ndarray"):
        raise refusal(f"a NumPy array: expected numpy.ndarray, got {quoted(str(kind))}")
    return _NdarrayBuilder()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """`_codecs.encode`, by which pickle protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise refusal("pickle: expected bytes as latin1 text, got another encoding")
    return text.encode("latin1")


def _tensor(storage: object, offset: Any, shape: Any, strides: Any, *_: object) -> Array:
    """torch's `_rebuild_tensor_v2`, without gradients and hooks."""
    if not isinstance(storage, Storage):
        raise refusal(f"a tensor: expected a storage, got {quoted(storage)}")
    return strided(storage, offset, shape, strides)


def _parameter(data: object, *_: object) -> Array:
    if not isinstance(data, Array):
        raise refusal(f"a parameter: expected a tensor, got {quoted(data)}")
    return data


def _ordered_dict(pairs: object = ()) -> dict[str, Any]:
    values = {}
    for pair in pairs if isinstance(pairs, list | tuple) else ():
        key, value = pair
        if type(key) is not str:
            raise refusal(f"pickle: expected strings as the keys of an ordered dict, got {quoted(key)}")
        values[key] = value
    return values


def _unused(*_: object) -> None: ...


def _no_entries(*_: object) -> dict[str, Any]:
    return {}


# Values beside the parameters, such as a LightningModule's hyper-parameters: read as data, and not used.
_BESIDE: Final[Mapping[Name, Call]] = {
    **{Name("pathlib", f"{kind}Path"): _unused for kind in ("Posix", "Windows", "PurePosix", "PureWindows")},
    Name("torch", "device"): _unused,
    Name("collections", "Counter"): _no_entries,
    Name("collections", "defaultdict"): _no_entries,
    Name("lightning_fabric.utilities.data", "AttributeDict"): _no_entries,
    Name("lightning.fabric.utilities.data", "AttributeDict"): _no_entries,
    Name("pytorch_lightning.utilities.parsing", "AttributeDict"): _no_entries,
    Name("lightning.pytorch.utilities.parsing", "AttributeDict"): _no_entries,
    **{Name(f"omegaconf.{kind}config", f"{kind.title()}Config"): _no_entries for kind in ("dict", "list")},
    **{Name("omegaconf.base", name): _no_entries for name in ("ContainerMetadata", "Metadata")},
    **{
        Name("omegaconf.nodes", f"{kind}Node"): _no_entries
        for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path")
    },
}
CALLS: Final[Mapping[Name, Call]] = {
    **_BESIDE,
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("argparse", "Namespace"): dict,  # a training script's options: a dict once its state is set
    Name("_codecs", "encode"): _encode,
    Name("numpy", "dtype"): _dtype,
    **{Name(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{Name(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{Name(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
    Name("torch", "Size"): lambda sizes=(): tuple(sizes),
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
}
_TYPES: Final = {
    Name(module, name) for module in ("builtins", "__builtin__") for name in ("dict", "list", "int", "long")
}
INERT: Final = frozenset({Name("numpy", "ndarray"), Name("typing", "Any"), *STORAGES, *_TYPES})
