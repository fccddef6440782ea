"""Arrays of a checkpoint, and the closed table of what a pickle may have called to make them.

An array is read from its file when it is asked for, so that of a checkpoint with an optimiser's state and a frozen
backbone only what is wanted comes into memory. What it says of its size is compared with the bytes that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .pickled import Call, Made, Name, plain
from .refusal import refused, shown

MAX_AXES: Final = 8
BFLOAT16: Final = "bfloat16"
KINDS: Final = {
    **{name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "float64", "int8", "int16")},
    **{name: np.dtype(name).newbyteorder("<") for name in ("int32", "int64", "uint8", "bool")},
    BFLOAT16: np.dtype("<u2"),  # NumPy has no such type: the bits, which are the upper half of a float32's
}


@dataclass(frozen=True)
class Array:
    """Numbers of a checkpoint, not read yet. `kind` is a key of KINDS."""

    kind: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    def floats(self, name: str) -> NDArray[np.float32]:
        """The numbers as float32; `name` is for the message. Raises Unprocessable for NaN and infinity."""
        raw = self.read()
        wide = (raw.astype("<u4") << 16).view("<f4") if self.kind == BFLOAT16 else raw
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(wide, dtype=np.float32).reshape(self.shape)
        if not np.isfinite(found).all():
            raise refused(f"{shown(name)}: expected finite numbers, got NaN or infinity")
        return found


@dataclass(frozen=True)
class Storage:
    """A run of `count` numbers in the file, as torch keeps them. `read(first, stop)` gives the bytes from number
    `first` to before number `stop`."""

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
    """A tensor: a view of a storage. Raises Unprocessable unless all of it, and no more, lies in the storage."""
    if not (_naturals((offset,)) and _naturals(shape) and _naturals(strides) and len(shape) == len(strides)):
        raise refused("a tensor's offset, shape and strides: expected natural numbers, as many strides as sizes")
    stop = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        stop = offset
    if stop > storage.count or math.prod(shape) > storage.count:
        raise refused(
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


# --- what a pickle may have called ------------------------------------------------------------------------------------


class _Dtype(Made):
    """numpy.dtype('f4'), whose byte order comes with the state."""

    def __init__(self, code: str) -> None:
        self._code = code

    def build(self, state: Any) -> np.dtype[Any]:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order not in ("<", "|", ">", "="):
            raise refused(f"a NumPy dtype's byte order: expected <, > or |, got {shown(order)}")
        return np.dtype(self._code).newbyteorder("<" if order == "=" else order)


class _Whole(Made):
    """numpy.ndarray as it comes from `_reconstruct`: empty until its state is given."""

    def build(self, state: Any) -> Array:
        if type(state) is not tuple or len(state) != 5:
            raise refused("a NumPy array's state: expected (version, shape, dtype, order, bytes), got another")
        _, shape, dtype, fortran, data = state
        return _array(data, plain(dtype), shape, "F" if fortran is True else "C")


def _dtype(code: object, *_: object) -> _Dtype:
    if not isinstance(code, str) or code not in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}:
        raise refused(f"a NumPy array: expected numbers of up to 8 bytes, got dtype {shown(code)}")
    return _Dtype(code)


def _array(data: object, dtype: object, shape: object, order: object = "C") -> Array:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise refused("a NumPy array: expected a dtype and bytes, got others")
    if type(shape) is not tuple or not _naturals(shape) or math.prod(shape) * dtype.itemsize != len(data):
        size = list(shape) if type(shape) is tuple and _naturals(shape) else shown(shape)
        raise refused(f"a NumPy array of shape {size}: expected as many {dtype} numbers as that, got {len(data)} bytes")
    numbers = np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
    kind = "bool" if dtype.kind == "b" else dtype.newbyteorder("=").name
    return Array(kind, shape, lambda: numbers)


def _scalar(dtype: object, data: object) -> float:
    numbers = _array(data, dtype, (1,)).read()
    return float(numbers[0])


def _reconstruct(kind: object, *_: object) -> _Whole:
    if kind != Name("numpy", "ndarray"):
        raise refused(f"a NumPy array: expected numpy.ndarray, got {shown(str(kind))}")
    return _Whole()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise refused("pickle: expected bytes as latin1 text, got another encoding")
    return text.encode("latin1")


def _tensor(storage: object, offset: Any, shape: Any, strides: Any, *_: object) -> Array:
    """torch's `_rebuild_tensor_v2`; whether it wanted gradients, and its hooks, are nothing to us."""
    if not isinstance(storage, Storage):
        raise refused(f"a tensor: expected a storage, got {shown(storage)}")
    return strided(storage, offset, shape, strides)


def _parameter(data: object, *_: object) -> Array:
    if not isinstance(data, Array):
        raise refused(f"a parameter: expected a tensor, got {shown(data)}")
    return data


def _ordered(pairs: object = ()) -> dict[str, Any]:
    found = {}
    for pair in pairs if isinstance(pairs, list | tuple) else ():
        key, value = pair
        if type(key) is not str:
            raise refused(f"pickle: expected words as the keys of an ordered dict, got {shown(key)}")
        found[key] = value
    return found


CALLS: Final[Mapping[Name, Call]] = {
    Name("collections", "OrderedDict"): _ordered,
    Name("argparse", "Namespace"): dict,  # the command line of a training script; its state makes it a dict
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
INERT: Final = frozenset({Name("numpy", "ndarray"), *STORAGES})
