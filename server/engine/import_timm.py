"""Imports timm without two parts that serving never uses: the compiler behind `torch.compile`, and the client of the
weights hub.

Their import takes time and much memory. timm and torchvision each touch `torch._dynamo` once during their import: one
marks a function as not to be compiled, the other takes a function that checks whether something can be compiled. During
the import, stand-ins defer both until they are called; any other use of the compiler loads the real one at once, as
every use after the import does. The hub's client is optional to timm, which checks once whether it is installed.
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
    """Import torch and timm. hub: whether timm may fetch weights by itself; if False, timm treats its hub client as not
    installed, permanently."""
    import torch  # noqa: F401 - before the stand-ins: torch itself needs the real modules

    with _put_off(), nullcontext() if hub else _hidden(HUB):
        import timm  # noqa: F401


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make an import of `name` fail meanwhile, unless it has been imported before."""
    if name in sys.modules:
        yield
        return
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules[name] = None  # `import` reads None as "not found"
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
    stand_ins[PARTS].__dict__.update(is_compile_supported=_deferred("is_compile_supported"))
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
    """Stand-in of `torch._dynamo.disable`: marks the function when it is first called."""
    if not isinstance(fn, FunctionType):
        return _real(COMPILER).disable(fn, *rest, **options)

    @functools.wraps(fn)
    def marked(*args: Any, **kwargs: Any) -> Any:
        return _real(COMPILER).disable(fn, *rest, **options)(*args, **kwargs)

    return marked


def _deferred(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(_real(PARTS), name)(*args, **kwargs)

    return call
