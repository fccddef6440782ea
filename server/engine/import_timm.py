"""timm without what serving never uses: the compiler behind `torch.compile`, and the client of a hub of weights.

Their import takes time and much memory. timm and torchvision each touch `torch._dynamo` once while they are imported:
one marks a function as not to be compiled, one takes a function that asks whether something can be. While they are,
stand-ins answer that put both off until they are called; whoever wants more of the compiler gets the real one at once,
as everybody does afterwards. The hub's client is optional to timm, which looks once whether it is installed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType, ModuleType
from typing import Any

COMPILER, PARTS = "torch._dynamo", "torch._dynamo.utils"
HUB = "huggingface_hub"


def import_timm(*, hub: bool = True) -> None:
    """Import torch and timm. hub: whether timm is to find weights by itself; without, it takes the client of its hub
    for not installed, for good."""
    import torch  # noqa: F401 - before the stand-ins: it is not theirs to answer what torch asks of itself

    with _put_off(), nullcontext() if hub else _hidden(HUB):
        import timm  # noqa: F401


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """An import of it fails meanwhile, unless it has been imported before."""
    if name in sys.modules:
        yield
        return
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules[name] = None  # what import takes for "not found"
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _put_off() -> Iterator[None]:
    if COMPILER in sys.modules:
        yield
        return
    stand_ins = {COMPILER: _StandIn(COMPILER), PARTS: _StandIn(PARTS)}
    stand_ins[COMPILER].__dict__.update(disable=_disable, utils=stand_ins[PARTS], __path__=[])
    stand_ins[PARTS].__dict__.update(is_compile_supported=_asked_later("is_compile_supported"))
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _dismiss()


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks every module for its file
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    _dismiss()
    import torch._dynamo.utils  # noqa: F401 - its parent comes with it

    return sys.modules[name]


def _dismiss() -> None:
    for name in (COMPILER, PARTS):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _disable(fn: Any = None, *rest: Any, **options: Any) -> Any:
    """`torch._dynamo.disable`: the function, marked when it is first called."""
    if not isinstance(fn, FunctionType):
        return _real(COMPILER).disable(fn, *rest, **options)

    @functools.wraps(fn)
    def marked(*args: Any, **kwargs: Any) -> Any:
        return _real(COMPILER).disable(fn, *rest, **options)(*args, **kwargs)

    return marked


def _asked_later(name: str) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        return getattr(_real(PARTS), name)(*args, **kwargs)

    return asked
