"""Hostile checkpoints, each by name, each with its refusal; none of them may run anything or fill the memory.

Programs are written here opcode by opcode, and by Python's own pickler from classes whose `__reduce__` asks for what a
thief would ask for. Whoever unpickled one of those would write the file that every test looks for.
"""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.errors import Unprocessable
from server.importing.checkpoint import Checkpoint

MARKER = Path("/tmp") / f"lensrack-unpickled-{os.getpid()}"


class Asks:
    """Pickled, it asks for a call."""

    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return self._reduced


def zipped(program: bytes, *, compression: int = zipfile.ZIP_STORED, **storages: bytes) -> bytes:
    """A file of torch.save around a given program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key[1:]}", data)
    return file.getvalue()


def asking(*reduced: Any, protocol: int = 2) -> bytes:
    return zipped(pickle.dumps({"prompt_token": Asks(*reduced)}, protocol=protocol))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], count: int = 6, held: int = 6) -> bytes:
    """A tensor over a storage that claims `count` numbers and has `held`."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n"
    persistent = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    arguments = b"(" + persistent + number(offset) + tuple_of(shape) + tuple_of(strides) + b"\x89" + b"Nt"
    return zipped(b"\x80\x02}" + text("head.weight") + call + arguments + b"Rs.", _0=b"\0" * 4 * held)


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tuple_of(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def array(shape: tuple[int, ...], data: bytes = b"\0" * 8, dtype: bytes = b"f4") -> bytes:
    """A NumPy array as protocol 2 writes it, with a given shape."""
    kind = (
        b"cnumpy\ndtype\n"
        + text(dtype.decode())
        + b"\x89\x88\x87R(K\x03"
        + text("<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    code = b"c_codecs\nencode\n" + text("b") + text("latin1") + b"\x86R"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + code + b"\x87R"
    state = b"(K\x01" + tuple_of(shape) + kind + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb"
    return zipped(b"\x80\x02}" + text("head.weight") + empty + state + b"s.")


def laughs() -> bytes:
    """A dict that holds a dict a thousand times, which holds a dict a thousand times, …"""
    program = b"\x80\x02}q\x00"
    for level in range(1, 8):
        entries = b"".join(text(str(n)) + b"h" + bytes([level - 1]) for n in range(1000))
        program += b"}q" + bytes([level]) + b"(" + entries + b"u"
    return zipped(program + b".")


def doubled() -> bytes:
    """The same megabytes encoded again and again: the bytes, not the program, would fill the memory."""
    once = b"c_codecs\nencode\nq\x01" + text("x" * 4_000_000) + b"q\x02" + text("latin1") + b"q\x03000"
    again = b"h\x01h\x02h\x03\x86R"
    return zipped(b"\x80\x02]" + once + b"(" + again * 5000 + b"e.")


def copied() -> bytes:
    """A list handed to OrderedDict and torch.Size again and again."""
    program = b"\x80\x02]q\x00](" + b"K\x01" * 50_000 + b"eq\x01\x85q\x020"
    return zipped(program + b"ctorch\nSize\nq\x030(" + b"h\x03h\x02R" * 100_000 + b"e.")


def endless() -> bytes:
    """A list that holds a list ten times, which holds a list ten times, …: written out it has no end."""
    program = b"]q\x00"
    for level in range(1, 30):
        program += b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 10 + b"e"
    return program


def deep() -> bytes:
    return zipped(
        b"\x80\x02}" + text("a") + b"}" * 0 + b"".join(b"}" + text("a") for _ in range(20)) + b"}" + b"s" * 21 + b"."
    )


WRITE = f"open({str(MARKER)!r}, 'w').close()"
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    # calls
    "os.system": (lambda: asking(os.system, (f"touch {MARKER}",)), "'posix.system'"),
    "os.system in protocol 4": (lambda: asking(os.system, (f"touch {MARKER}",), protocol=4), "'posix.system'"),
    "builtins.eval": (lambda: asking(eval, (WRITE,)), "'__builtin__.eval'"),
    "builtins.exec": (lambda: asking(exec, (WRITE,), protocol=4), "'builtins.exec'"),
    "builtins.getattr": (lambda: asking(getattr, (os, "system")[1:] * 2), "'__builtin__.getattr'"),
    "getattr through a dotted name": (
        lambda: zipped(b"\x80\x04" + text("torch") + text("_utils.os.system") + b"\x93" + text("id") + b"\x85R."),
        "'torch._utils.os.system'",
    ),
    "numpy through a dotted name": (
        lambda: zipped(b"\x80\x04" + text("numpy") + text("ndarray.tofile") + b"\x93."),
        "'numpy.ndarray.tofile'",
    ),
    "functools.partial": (lambda: asking(functools.partial, (print, 1)), "'functools.partial'"),
    "torch.load within": (lambda: asking(torch.load, (str(MARKER),)), "'torch.serialization.load'"),
    "torch's unpickler of storages": (
        lambda: zipped(b"\x80\x02ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R."),
        "'torch.storage._load_from_bytes'",
    ),
    "a defaultdict, which calls": (lambda: asking(collections.defaultdict, (print,)), "'__builtin__.print'"),
    "a name called that is not for calling": (
        lambda: zipped(b"\x80\x02cnumpy\nndarray\n" + tuple_of((3,)) + b"R."),
        "got a call of 'numpy.ndarray'",
    ),
    "INST": (lambda: zipped(b"(" + text("id") + b"ios\nsystem\n."), "opcode INST"),
    "OBJ": (lambda: zipped(b"(cos\nsystem\n" + text("id") + b"o."), "'os.system'"),
    "EXT1": (lambda: zipped(b"\x80\x02\x82\x01."), "opcode EXT1"),
    "NEWOBJ_EX": (lambda: zipped(b"\x80\x04\x92."), "opcode NEWOBJ_EX"),
    "a buffer from outside": (lambda: zipped(b"\x80\x05\x97."), "opcode NEXT_BUFFER"),
    "a persistent id of another kind": (lambda: zipped(b"\x80\x02" + text("storage") + b"Q."), "a persistent id"),
    "a plain pickle": (lambda: pickle.dumps(Asks(os.system, (f"touch {MARKER}",)), protocol=4), "'posix.system'"),
    "the old stream": (
        lambda: b"".join(pickle.dumps(own, protocol=2) for own in (
            0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": Asks(os.system, (f"touch {MARKER}",))}, []
        )),
        "'posix.system'",
    ),
    # arrays that lie
    "an array of objects": (lambda: array((1,), dtype=b"O8"), "got dtype 'O8'"),
    "an array of void": (lambda: array((1,), dtype=b"V8"), "got dtype 'V8'"),
    "a huge array": (lambda: array((2**39, 2**39)), "got 8 bytes"),
    "a negative array": (lambda: array((-2,)), "got 8 bytes"),
    "an array cut short": (lambda: array((3,)), "got 8 bytes"),
    "a tensor beyond its storage": (lambda: tensor(1, (2, 3), (3, 1)), "within its storage of 6"),
    "a tensor before its storage": (lambda: tensor(-1, (2, 3), (3, 1)), "natural numbers"),
    "a tensor of one number a billion times": (lambda: tensor(0, (2**30,), (0,)), "within its storage of 6"),
    "a tensor backwards": (lambda: tensor(5, (6,), (-1,)), "natural numbers"),
    "a storage that claims more": (lambda: tensor(0, (7,), (1,), count=7), "expected 28 bytes in the zip, got 24"),
    "a storage that is not there": (
        lambda: tensor(0, (6,), (1,)).replace(b"archive/data/0", b"archive/data/1"), "got none"),
    "NaN": (lambda: array((2,), np.array([np.nan, 1], "<f4").tobytes()), "got NaN or infinity"),
    # memory
    "a memo of four billion": (lambda: zipped(b"\x80\x02Nr\xff\xff\xff\xff."), "a dict of arrays, got None"),
    "a memo that is not there": (lambda: zipped(b"\x80\x02h\x07."), "KeyError"),
    "text of eight exabytes": (lambda: zipped(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"x."), "damaged"),
    "a million laughs": (laughs, "values in nested dicts"),
    "dicts within dicts": (deep, "at most 8 deep"),
    "bytes made again and again": (doubled, "expected it to build at most"),
    "lists handed over again and again": (copied, "expected it to build at most"),
    "an endless list called": (lambda: zipped(b"\x80\x02" + endless() + b")R."), "got a call of a list"),
    "an endless list as a key": (lambda: zipped(b"\x80\x02" + endless() + b"}h\x1dNs."), "got a list"),
    "an endless list as an id": (lambda: zipped(b"\x80\x02" + endless() + b"Q."), "a persistent id"),
    "nothing but an endless list": (lambda: zipped(b"\x80\x02" + endless() + b"."), "got a list"),
    "a million opcodes": (lambda: zipped(b"\x80\x02" + b"N0" * 600_000 + b"N."), "opcodes, got more"),
    "a dict under itself": (lambda: zipped(b"\x80\x02}q\x00" + text("a") + b"h\x00s."), "at most 8 deep"),
    "keys that hold themselves": (lambda: zipped(b"\x80\x02}K\x01\x85K\x01s."), "keys to be strings or numbers"),
    # the zip
    "a compressed program": (lambda: zipped(b"\x80\x02}." * 9, compression=zipfile.ZIP_DEFLATED), "got it compressed"),
    "no program": (lambda: zipped(b"\x80\x02}.").replace(b"data.pkl", b"data.txt"), "NAME/data.pkl, got 0"),
    "a zip cut short": (lambda: zipped(b"\x80\x02}.")[:-30], "damaged zip"),
    "a stack that ran dry": (lambda: zipped(b"\x80\x020."), "IndexError"),
    "a program without an end": (lambda: zipped(b"\x80\x02}"), "damaged"),
    "no bytes": (lambda: b"", "got neither"),
    "noise": (lambda: bytes(range(256)), "got neither"),
    "safetensors with a header of 2^63": (lambda: b"\xff" * 7 + b"\x7f{}", "got neither"),
}  # fmt: skip


def everything(data: bytes) -> None:
    """Read a checkpoint and all of its arrays."""
    checkpoint = Checkpoint.read([("x.pth", io.BytesIO(data))])
    for name in checkpoint.arrays:
        checkpoint.floats(name)


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_and_runs_nothing(name: str) -> None:
    make, message = ATTACKS[name]
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(Unprocessable) as refusal:
            everything(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not MARKER.exists(), "something of the file was run"
    assert refusal.value.code == "bad_checkpoint"
    assert message in refusal.value.detail
    assert len(refusal.value.detail) < 600
    assert peak < 500 * 2**20


def test_an_unpickler_would_have_run_it() -> None:
    """The attacks are real: Python's own unpickler runs what we refuse."""
    data = pickle.dumps(Asks(os.system, (f"touch {MARKER}",)), protocol=4)
    try:
        pickle.loads(data)  # noqa: S301
        assert MARKER.exists()
    finally:
        MARKER.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "stream"])
def test_damage_anywhere_is_refused_or_changes_numbers_only(kind: dict[str, bool]) -> None:
    """Every byte of a good file turned over, one after the other: no other error ever comes out."""
    file = io.BytesIO()
    torch.save({"head.weight": torch.ones(2, 3), "x": np.ones(2, np.float32)}, file, **kind)
    good = file.getvalue()
    for place in range(0, len(good), 3):
        damaged = good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :]
        try:
            everything(damaged)
        except Unprocessable as refusal:
            assert refusal.code == "bad_checkpoint"  # noqa: PT017
