"""Pixels in shared memory: slots that a front end writes and the engine reads.

A front end creates the memory, seals its size (memory that shrinks would crash its reader) and passes its descriptor
once. A slot holds one image in the larger of its two forms; unwritten pages take no memory, and the slot freed last is
used next. A slot is free again when every row that shows its image has left the engine.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from server.errors import QueueFull

from .protocol import Form, ProtocolError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FORMS: Final[dict[Form, np.dtype[Any]]] = {Form.BYTES: np.dtype(np.uint8), Form.FLOATS: np.dtype(np.float32)}
MOST_BYTES: Final = 64 * 2**30  # of address space, not of memory


def slot_bytes(size: int) -> int:
    """A float32 picture of `size` pixels a side, in whole pages."""
    return -(-size * size * 3 * 4 // mmap.PAGESIZE) * mmap.PAGESIZE


def shape(form: Form, size: int) -> tuple[int, int, int]:
    return (size, size, 3) if form == Form.BYTES else (3, size, size)


def _view(memory: mmap.mmap, slot: int, form: Form, size: int) -> NDArray[Any]:
    dtype, count = _FORMS[form], size * size * 3
    return np.frombuffer(memory, dtype, count, slot * slot_bytes(size)).reshape(shape(form, size))


@dataclass
class _WrittenImage:
    image: NDArray[Any]  # kept, so that its id stays its own
    slot: int
    rows: int


class PixelWriter:
    """The front end's side. An image that several rows show, the same array object, is written once."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.descriptor = os.memfd_create("lensrack-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, count * slot_bytes(size))
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self._memory = mmap.mmap(self.descriptor, count * slot_bytes(size))
        self._free = list(range(count - 1, -1, -1))
        self._written: dict[int, _WrittenImage] = {}

    def put(self, image: NDArray[Any]) -> tuple[int, Form]:
        """Write a row's image, and return its slot and form. Raises QueueFull, and ValueError for a wrong array."""
        form = Form.FLOATS if image.dtype == np.float32 else Form.BYTES
        if image.dtype != _FORMS[form] or image.shape != shape(form, self.size):
            raise ValueError(f"expected uint8 {list(shape(Form.BYTES, self.size))}, got {image.dtype} {image.shape}")
        written = self._written.get(id(image))
        if written is None:
            if not self._free:
                raise QueueFull(f"all {self.count} places for pixels are taken")
            written = self._written[id(image)] = _WrittenImage(image, self._free.pop(), 0)
            _view(self._memory, written.slot, form, self.size)[:] = image
        written.rows += 1
        return written.slot, form

    def drop(self, image: NDArray[Any]) -> None:
        """A row that shows this image has left the engine: free the slot with its last row."""
        written = self._written[id(image)]
        written.rows -= 1
        if not written.rows:
            del self._written[id(image)]
            self._free.append(written.slot)

    @property
    def used(self) -> int:
        return len(self._written)

    def close(self) -> None:
        os.close(self.descriptor)


class PixelReader:
    """The engine's side: the same array object each time for the same slot and form."""

    def __init__(self, descriptor: int, count: int, size: int) -> None:
        """Raises ProtocolError for a memory of another size, or one whose size is not sealed."""
        expected = count * slot_bytes(size)
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:
            sealed = False
        if not 0 < expected <= MOST_BYTES or not sealed or os.fstat(descriptor).st_size != expected:
            raise ProtocolError(f"expected a sealed memory of {count} slots for pictures of {size} pixels a side")
        self._memory = mmap.mmap(descriptor, expected, prot=mmap.PROT_READ)
        self._count, self._size = count, size
        self._views: dict[tuple[int, Form], NDArray[Any]] = {}

    def picture(self, slot: int, form: Form) -> NDArray[Any]:
        """Raises ProtocolError."""
        if slot >= self._count:
            raise ProtocolError(f"expected one of {self._count} slots, got {slot}")
        if (slot, form) not in self._views:
            self._views[slot, form] = _view(self._memory, slot, form, self._size)
        return self._views[slot, form]
