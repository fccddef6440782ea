"""Reads a pickle as data: its program runs on a restricted stack machine whose values are plain ones.

Python's unpickler, and torch's behind `weights_only`, import names and call them, and rely on lists of exceptions for
safety. Here no name is ever imported and no object of a file is ever called. The standard library's disassembler
decodes the opcodes, a name is a pair of strings, and a call is looked up in a closed table of our own functions that
build plain data. A name that is not in the table ends the reading.

    opcodes ──► stack of None, bool, int, float, str, bytes, list, tuple, dict, Array, Name ──► the one value left

The memory that a program can fill is bounded by its length, its number of opcodes, and the size of its calls'
arguments.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn

from .refusal import quoted, refusal

MAX_OPCODES: Final = 500_000
MAX_BUILT_BYTES: Final = 256 * 2**20  # by calls, which may receive the same argument again and again
ENTRY_BYTES: Final = 100  # counted for each entry of a list or dict
_UNREADABLE: Final = (ValueError, TypeError, LookupError, OverflowError, RecursionError, AttributeError)


@dataclass(frozen=True)
class Name:
    """The name of a Python object in a pickle: a pair of strings that is never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


class Builder:
    """A value that a function of the table has begun and that a BUILD opcode completes."""

    def build(self, state: Any) -> Any:
        """The finished value."""
        raise NotImplementedError


Call = Callable[..., Any]
Persistent = Callable[[Any], Any]
_MARK: Final = object()


class _Cell:
    """Holds a value that is completed in place, so that memo and stack see the completed one."""

    def __init__(self, value: Any) -> None:
        self.value = value


def read(file: BinaryIO, calls: Mapping[Name, Call], inert: frozenset[Name], persistent: Persistent) -> Any:
    """The value of the pickle at the position of `file`, which is left behind its end.

    `calls`: names that may be called, with our functions for them. `inert`: names that may occur without being called.
    `persistent` resolves persistent ids. Raises Unprocessable bad_checkpoint.
    """
    return _Machine(calls, inert, persistent).run(file)


class _Machine:
    def __init__(self, calls: Mapping[Name, Call], inert: frozenset[Name], persistent: Persistent) -> None:
        self._calls, self._allowed, self._persistent = calls, inert | calls.keys(), persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._built_bytes = 0

    def run(self, file: BinaryIO) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count >= MAX_OPCODES:
                    raise refusal(f"pickle: expected at most {MAX_OPCODES} opcodes, got more")
                if opcode.name == "STOP":
                    return plain(self._stack.pop())
                _STEPS.get(opcode.name, _forbid)(self, argument if opcode.name in _STEPS else opcode.name)
        except _UNREADABLE as error:
            raise refusal(f"pickle: damaged or not one ({type(error).__name__})") from error
        raise refusal("pickle: expected it to end with a value, got the end of the file")

    # --- the stack ----------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        """The items above the last mark; removes them and the mark."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                items = self._stack[place + 1 :]
                del self._stack[place:]
                return items
        raise ValueError("no mark")

    def top(self, kind: type) -> Any:
        value = self._stack[-1]
        if type(value) is not kind:
            raise ValueError(f"expected a {kind.__name__}")
        return value

    # --- the opcodes --------------------------------------------------------------------------------------------------

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def discard(self, _: Any) -> None:
        self._stack.pop()

    def discard_to_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def remember(self, number: int | None) -> None:
        self._memo[len(self._memo) if number is None else number] = self._stack[-1]

    def recall(self, number: int) -> None:
        self.push(self._memo[number])

    def name(self, words: str | None) -> None:
        """GLOBAL has module and name in its argument, separated by a space; STACK_GLOBAL takes them from the stack."""
        if words is None:
            name, module = self.pop(), self.pop()
        else:
            module, _, name = words.partition(" ")
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name is two strings")
        full_name = Name(module, name)
        if full_name not in self._allowed:
            raise refusal(f"pickle: expected tensors, NumPy arrays and plain values, got {quoted(str(full_name))}")
        self.push(full_name)

    def call(self, _: Any) -> None:
        arguments, name = self.pop(), self.pop()
        if type(arguments) is not tuple or not isinstance(name, Name) or name not in self._calls:
            target = str(name) if isinstance(name, Name) else name
            raise refusal(f"pickle: expected a call that builds an array, got a call of {quoted(target)}")
        values = [plain(argument) for argument in arguments]
        self._count_built(values)
        built = self._calls[name](*values)
        self.push(_Cell(built) if isinstance(built, Builder) else built)

    def build(self, _: Any) -> None:
        state, cell = plain(self.pop()), self._stack[-1]
        self._count_built([state])
        if type(cell) is dict and type(state) is dict:
            cell.update(state)  # attributes that torch sets on an OrderedDict, or a Namespace's
        elif isinstance(cell, _Cell) and isinstance(cell.value, Builder):
            cell.value = cell.value.build(state)
        else:
            raise ValueError("nothing that takes a state")

    def _count_built(self, values: list[Any]) -> None:
        """Count the values' size, which is about that of what is built of them. Raises beyond MAX_BUILT_BYTES."""
        for value in values:
            size = len(value) if isinstance(value, str | bytes | bytearray | list | tuple | dict) else 0
            self._built_bytes += size if isinstance(value, str | bytes | bytearray) else ENTRY_BYTES * size
        if self._built_bytes > MAX_BUILT_BYTES:
            raise refusal(f"pickle: expected it to build at most {MAX_BUILT_BYTES} bytes, got more")

    def outside(self, _: Any) -> None:
        self.push(self._persistent(plain(self.pop())))

    def append(self, _: Any) -> None:
        item = self.pop()
        self.top(list).append(item)

    def extend(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        _put(self.top(dict), [key, value])

    def set_items(self, _: Any) -> None:
        items = self.pop_to_mark()
        _put(self.top(dict), items)

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)][::-1]
        self.push(tuple(items))


def _put(target: dict[Any, Any], items: list[Any]) -> None:
    """Set a dict's items. Keys must be strings or numbers, since comparing nested tuples may never end."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, bool, float):
            raise refusal(f"pickle: expected a dict's keys to be strings or numbers, got {quoted(key)}")
        target[key] = value


def plain(value: Any) -> Any:
    """The value itself, out of the cell it was built in. Readers of lists, tuples and dicts call it for each item."""
    if isinstance(value, _Cell):
        if isinstance(value.value, Builder):
            raise refusal("pickle: an array without its content")
        return value.value
    return value


def _forbid(machine: _Machine, opcode: str) -> NoReturn:
    raise refusal(f"pickle: opcode {opcode} is not allowed; no checkpoint needs it")


def _skip(machine: _Machine, _: Any) -> None:
    pass


def _push(machine: _Machine, value: Any) -> None:
    machine.push(value)


Step = Callable[[_Machine, Any], None]
_PUSH: Final = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_STEPS: Final[dict[str, Step]] = {
    **dict.fromkeys(_PUSH, _push),
    **dict.fromkeys(("PROTO", "FRAME"), _skip),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_to_mark,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.outside,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
}
