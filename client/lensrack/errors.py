"""Everything a call can raise.

    LensrackError
    ├── InvalidInput             nothing was sent: an argument is invalid (also a ValueError)
    ├── ConnectError             no connection, or it broke before the answer was complete (also a ConnectionError)
    ├── RequestTimeout           no complete answer, or no finished job, in time (also a TimeoutError)
    ├── ProtocolError            the response is not a message of this protocol
    ├── JobFailed                the job waited for has failed or was cancelled; has `job`
    └── ApiError                 the server refused; has status, code, detail, request_id, problem, retry_after_s
        ├── BadRequestError        400, 422
        ├── AuthenticationError    401, 403
        ├── NotFoundError          404
        ├── ConflictError          409
        ├── PreconditionFailedError 412
        ├── TooLargeError          413
        ├── UnsupportedMediaError  415
        ├── RateLimitedError       429
        └── ServerError            5xx
            ├── UnavailableError     503
            └── DeadlineError        504

`code` is the stable name to branch on (`task_not_found`, `queue_full`, …); `detail` is for people.
"""

from __future__ import annotations

from .wire import Job, Problem


class LensrackError(Exception):
    """The base class of this package's errors."""


class InvalidInput(LensrackError, ValueError):
    """An argument is invalid; nothing was sent."""


class ConnectError(LensrackError, ConnectionError):
    """The server could not be reached, or the connection broke before the answer was complete."""


class RequestTimeout(LensrackError, TimeoutError):
    """The answer, or the end of a job, did not come in time."""


class ProtocolError(LensrackError):
    """The response is not a message of this protocol: a wrong URL, a proxy in between, or an incompatible server."""


class JobFailed(LensrackError):
    """A job ended without a version: it failed or was cancelled."""

    def __init__(self, job: Job) -> None:
        reason = f": {job.error.detail} ({job.error.code})" if job.error else ""
        super().__init__(f"job {job.id} {job.state}{reason}")
        self.job = job


class ApiError(LensrackError):
    """The server answered with an error (RFC 9457 problem document)."""

    def __init__(self, problem: Problem, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{problem.detail or problem.title} ({problem.code}, HTTP {problem.status})")
        self.problem = problem
        self.status = problem.status
        self.code = problem.code
        self.detail = problem.detail or problem.title
        self.request_id = problem.request_id
        self.retry_after_s = retry_after_s

    @staticmethod
    def of(problem: Problem, *, retry_after_s: float | None = None) -> ApiError:
        """Return an error of the class for the problem's status."""
        fallback = ServerError if problem.status >= 500 else ApiError
        return _BY_STATUS.get(problem.status, fallback)(problem, retry_after_s=retry_after_s)


class BadRequestError(ApiError):
    """400, 422: the request itself is wrong; sending it again changes nothing."""


class AuthenticationError(ApiError):
    """401, 403: the API key is missing, unknown or not allowed to do this."""


class NotFoundError(ApiError):
    """404: no such task, version, alias, dataset or job."""


class ConflictError(ApiError):
    """409: the request conflicts with the present state, such as an alias that points at the version to delete."""


class PreconditionFailedError(ApiError):
    """412: the alias has changed since its etag was read."""


class TooLargeError(ApiError):
    """413: the body or the image is larger than the server accepts."""


class UnsupportedMediaError(ApiError):
    """415: not a format the server reads."""


class RateLimitedError(ApiError):
    """429: too many requests; retry after `retry_after_s` seconds."""


class ServerError(ApiError):
    """5xx: the fault is not the caller's."""


class UnavailableError(ServerError):
    """503: the server is not ready, is shutting down, or cannot reach a service that it needs."""


class DeadlineError(ServerError):
    """504: the server could not answer within its own deadline."""


def concerns_image(error: LensrackError) -> bool:
    """Whether an error is about one image, so that others may still be answered."""
    return isinstance(error, InvalidInput) or (isinstance(error, ApiError) and error.status in _IMAGE_STATUSES)


_IMAGE_STATUSES = frozenset({400, 413, 415, 422})
_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    412: PreconditionFailedError,
    413: TooLargeError,
    415: UnsupportedMediaError,
    422: BadRequestError,
    429: RateLimitedError,
    503: UnavailableError,
    504: DeadlineError,
}
