"""A pickle read as data: its program runs on a machine whose only values are plain ones.

Python's unpickler, and torch's behind `weights_only`, look names up and call what they find; what is safe about them is
a list of exceptions. Here no name is ever looked up and no object of a file is ever called. The opcodes are taken apart
by the standard library's disassembler, a name is a pair of words, and what a program asks to have called is looked for
in a closed table of functions of ours that build plain data. A name that is not in it ends the reading.

    opcodes ──► stack of None, bool, int, float, str, bytes, list, tuple, dict, Array, Name ──► the one value left

What a program can fill memory with is bounded: by its own length, its opcodes, and what its calls are given.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn

from .refusal import refused, shown

MAX_OPCODES: Final = 500_000
MAX_MADE_BYTES: Final = 256 * 2**20  # by calls, which may be given the same thing again and again
ENTRY_BYTES: Final = 100  # of a list or dict
_UNREADABLE: Final = (ValueError, TypeError, LookupError, OverflowError, RecursionError, AttributeError)


@dataclass(frozen=True)
class Name:
    """What a program calls a thing of Python's. It stays a pair of words."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


class Made:
    """What a table's function has begun and a later opcode gives its state to."""

    def build(self, state: Any) -> Any:
        """The finished value."""
        raise NotImplementedError


Call = Callable[..., Any]
Persistent = Callable[[Any], Any]
_MARK: Final = object()


class _Hole:
    """A value that is finished in place, so that whoever remembers it sees the finished one."""

    def __init__(self, value: Any) -> None:
        self.value = value


def read(file: BinaryIO, calls: Mapping[Name, Call], inert: frozenset[Name], persistent: Persistent) -> Any:
    """The value of the pickle that begins where `file` stands, which then stands behind it.

    `calls`: what may be called, and our function for it. `inert`: names that may be mentioned. `persistent` gives what
    an id outside of the pickle stands for. Raises Unprocessable (bad_checkpoint).
    """
    return _Machine(calls, inert, persistent).run(file)


class _Machine:
    def __init__(self, calls: Mapping[Name, Call], inert: frozenset[Name], persistent: Persistent) -> None:
        self._calls, self._known, self._persistent = calls, inert | calls.keys(), persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._made_bytes = 0

    def run(self, file: BinaryIO) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count >= MAX_OPCODES:
                    raise refused(f"pickle: expected at most {MAX_OPCODES} opcodes, got more")
                if opcode.name == "STOP":
                    return plain(self._stack.pop())
                _STEPS.get(opcode.name, _forbidden)(self, argument if opcode.name in _STEPS else opcode.name)
        except _UNREADABLE as error:
            raise refused(f"pickle: damaged or not one ({type(error).__name__})") from error
        raise refused("pickle: expected it to end with a value, got the end of the file")

    # --- the stack ----------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        """What lies above the last mark, without the mark."""
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
        """GLOBAL has both words in its argument, parted by a blank; STACK_GLOBAL finds them on the stack."""
        if words is None:
            name, module = self.pop(), self.pop()
        else:
            module, _, name = words.partition(" ")
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name is made of two words")
        found = Name(module, name)
        if found not in self._known:
            raise refused(f"pickle: expected tensors, NumPy arrays and plain values, got {shown(str(found))}")
        self.push(found)

    def call(self, _: Any) -> None:
        arguments, name = self.pop(), self.pop()
        if type(arguments) is not tuple or not isinstance(name, Name) or name not in self._calls:
            what = str(name) if isinstance(name, Name) else name
            raise refused(f"pickle: expected a call that builds an array, got one of {shown(what)}")
        given = [plain(own) for own in arguments]
        self._spend(given)
        made = self._calls[name](*given)
        self.push(_Hole(made) if isinstance(made, Made) else made)

    def build(self, _: Any) -> None:
        state, hole = plain(self.pop()), self._stack[-1]
        self._spend([state])
        if type(hole) is dict and type(state) is dict:
            hole.update(state)  # attributes that torch hangs on an OrderedDict, or a Namespace's own
        elif isinstance(hole, _Hole) and isinstance(hole.value, Made):
            hole.value = hole.value.build(state)
        else:
            raise ValueError("nothing that takes a state")

    def _spend(self, given: list[Any]) -> None:
        """What is made of these is about as large as they are."""
        for value in given:
            size = len(value) if isinstance(value, str | bytes | bytearray | list | tuple | dict) else 0
            self._made_bytes += size if isinstance(value, str | bytes | bytearray) else ENTRY_BYTES * size
        if self._made_bytes > MAX_MADE_BYTES:
            raise refused(f"pickle: expected it to make at most {MAX_MADE_BYTES} bytes, got more")

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
    """Keys are words or numbers: to compare tuples within tuples may take for ever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, bool, float):
            raise refused(f"pickle: expected a dict's keys to be words or numbers, got {shown(key)}")
        target[key] = value


def plain(value: Any) -> Any:
    """A value without the hole it was built in. What lists, tuples and dicts hold, their reader asks this of."""
    if isinstance(value, _Hole):
        if isinstance(value.value, Made):
            raise refused("pickle: an array without its content")
        return value.value
    return value


def _forbidden(machine: _Machine, opcode: str) -> NoReturn:
    raise refused(f"pickle: opcode {opcode} does what no checkpoint needs")


def _nothing(machine: _Machine, _: Any) -> None:
    pass


def _value(machine: _Machine, value: Any) -> None:
    machine.push(value)


Step = Callable[[_Machine, Any], None]
_PUSHED: Final = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_STEPS: Final[dict[str, Step]] = {
    **dict.fromkeys(_PUSHED, _value),
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
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
