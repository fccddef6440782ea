"""The SDK of lensrack: train, publish and ask many vision tasks that share one frozen backbone.

    from lensrack import Client

    with Client() as client:
        dataset = client.datasets.upload("bottles/")
        client.train("trash", dataset.id).wait()
        print(client.predict("trash", "bottle.jpg").best.label)

`AsyncClient` has the same methods with await. What a call can raise is drawn at the top of `lensrack.errors`.
"""

from ._archive import Progress
from ._core import Reply, __version__
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
