"""The SDK of lensrack: train, publish and serve many vision tasks from one frozen backbone.

    from lensrack import Client

    with Client() as client:
        dataset = client.datasets.upload("bottles/")
        client.train("trash", dataset.id).wait()
        print(client.predict("trash", "bottle.jpg").best.label)

`AsyncClient` has the same methods with await. The docstring of `lensrack.errors` shows what a call can raise.

Modules are loaded when their names are first used: a server, which imports `lensrack.wire` alone, loads no HTTP client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._archive import Progress
    from ._core import Reply, __version__
    from ._evaluation import Evaluation
    from ._images import ImageInput
    from .answers import Answer, ManyAnswers, RawResponse
    from .async_client import AsyncClient, AsyncJobHandle
    from .client import Client, JobHandle
    from .errors import (
        ApiError,
        AuthenticationError,
        BadRequestError,
        ConflictError,
        ConnectError,
        DeadlineError,
        InvalidInput,
        JobFailed,
        LensrackError,
        NotFoundError,
        PreconditionFailedError,
        ProtocolError,
        RateLimitedError,
        RequestTimeout,
        ServerError,
        TooLargeError,
        UnavailableError,
        UnsupportedMediaError,
    )

__all__ = [
    "Answer",
    "ApiError",
    "AsyncClient",
    "AsyncJobHandle",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "ConnectError",
    "DeadlineError",
    "Evaluation",
    "ImageInput",
    "InvalidInput",
    "JobFailed",
    "JobHandle",
    "LensrackError",
    "ManyAnswers",
    "NotFoundError",
    "PreconditionFailedError",
    "Progress",
    "ProtocolError",
    "RateLimitedError",
    "RawResponse",
    "Reply",
    "RequestTimeout",
    "ServerError",
    "TooLargeError",
    "UnavailableError",
    "UnsupportedMediaError",
    "__version__",
]

_MODULE_OF = {  # all other names are in `errors`
    "Answer": "answers",
    "AsyncClient": "async_client",
    "AsyncJobHandle": "async_client",
    "Client": "client",
    "Evaluation": "_evaluation",
    "ImageInput": "_images",
    "JobHandle": "client",
    "ManyAnswers": "answers",
    "Progress": "_archive",
    "RawResponse": "answers",
    "Reply": "_core",
    "__version__": "_core",
}
_MODULES = ("answers", "async_client", "client", "errors", "wire")


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
