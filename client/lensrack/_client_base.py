"""What both clients are apart from their calls: shown by their server, copied by `with_options`, never pickled."""

from __future__ import annotations

from typing import NoReturn, TypeVar

from ._core import Config
from .errors import InvalidInput

C = TypeVar("C", bound="ClientBase")


class ClientBase:
    """The options and the connections of a client."""

    _config: Config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config.base_url!r})"

    def __copy__(self: C) -> C:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(
            f"a {type(self).__name__} holds connections and cannot be pickled or sent to another process: make one in "
            "each process"
        )
