"""A call without its transport: it builds requests, reads responses and decides about retries.

    Call ──> Exchange.request() ──> [a client sends] ──> Exchange.answered(reply) ──> value, pause or error
                     ^                      └──────────> Exchange.broken(error)  ──> pause or error
                     └────────────── after the pause ────────────────┘

Nothing here opens a connection or sleeps; only the two clients do.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from ._network import proxy_variable
from ._retry import RETRIED_STATUSES, Attempts, parse_retry_after
from .errors import ApiError, ConnectError, InvalidInput, LensrackError, ProtocolError, RequestTimeout
from .wire import Problem

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
N = TypeVar("N", int, float)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_RETRIES = 2
CONNECT_TIMEOUT_S = 5.0
QUOTA_EXCEEDED = "quota_exceeded"  # the day's jobs, or a full store: waiting between attempts does not help
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

try:
    __version__ = version("lensrack")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


@dataclass(frozen=True)
class Reply:
    """A complete HTTP response. Header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def request_id(self) -> str:
        """The id of the request in the server's log."""
        return self.headers.get("x-request-id", "")

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds by step, from the `Server-Timing` header: decode, queue, compute."""
        entries = re.findall(r"([\w-]+);dur=([\d.]+)", self.headers.get("server-timing", ""))
        return {name: float(milliseconds) / 1000 for name, milliseconds in entries}


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request to the server, and how its response is read.

    `payload` goes to `httpx.Request`. `repeatable`: sending it twice has the same effect as sending it once.
    `wait_s` is added to the timeout, `limit_s` caps it; a `transfer` has no total timeout, only one between bytes.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    params: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    payload: Mapping[str, Any] = field(default_factory=dict)
    repeatable: bool = True
    max_retries: int | None = None
    wait_s: float = 0.0
    limit_s: float | None = None
    transfer: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Config:
    """The server's address and the client's options."""

    base_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float
    max_retries: int
    client_resize: bool = False

    @classmethod
    def of(cls, base_url: str | None, api_key: str | None, timeout: float | None, max_retries: int | None) -> Config:
        """Return the configuration; None is replaced by the environment or the default. Raises InvalidInput."""
        key = (api_key or os.environ.get("LENSRACK_API_KEY", "")).strip()
        if not (key.isascii() and key.isprintable()):
            raise InvalidInput("the API key must be printable ASCII")
        url = _checked_url(base_url or os.environ.get("LENSRACK_URL") or DEFAULT_URL)
        defaults = cls(url, key or None, DEFAULT_TIMEOUT_S, DEFAULT_RETRIES)
        config = defaults.changed(
            _from_environment("LENSRACK_TIMEOUT", float), _from_environment("LENSRACK_RETRIES", int)
        )
        return config.changed(timeout, max_retries)

    def changed(
        self, timeout: float | None = None, max_retries: int | None = None, client_resize: bool | None = None
    ) -> Config:
        """Return a copy with the arguments that are not None. Raises InvalidInput."""
        timeout_s = self.timeout_s if timeout is None else timeout
        retries = self.max_retries if max_retries is None else max_retries
        if not timeout_s > 0 or retries < 0:
            raise InvalidInput(f"expected timeout > 0 and max_retries >= 0, got {timeout_s} and {retries}")
        resize = self.client_resize if client_resize is None else client_resize
        if resize and importlib.util.find_spec("PIL") is None:
            raise InvalidInput("client_resize needs Pillow: pip install 'lensrack[resize]'")
        return replace(self, timeout_s=timeout_s, max_retries=retries, client_resize=resize)

    def headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"lensrack/{__version__}", "Accept": "application/json, */*;q=0.5"}
        return {**headers, "Authorization": f"Bearer {self.api_key}"} if self.api_key else headers


def _from_environment(name: str, kind: Callable[[str], N]) -> N | None:
    text = os.environ.get(name, "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        raise InvalidInput(f"{name}: expected a number, got {text[:40]!r}") from None


def _trace() -> dict[str, str]:
    """Return the `traceparent` header of the caller's OpenTelemetry context; imports nothing if there is none."""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        importlib.import_module("opentelemetry.propagate").inject(headers)
    return headers


def _checked_url(text: str) -> str:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidInput(f"the server's URL {text!r} is invalid: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidInput(f"the server's URL must look like {DEFAULT_URL}, not {text!r}")
    return text.rstrip("/")


class Exchange(Generic[T]):
    """A call with its attempts, from the first request to the result."""

    def __init__(self, call: Call[T], config: Config, attempts: Attempts | None = None) -> None:
        self._call, self._config = call, config
        self._timeout_s = min(config.timeout_s + call.wait_s, call.limit_s or math.inf)
        most = config.max_retries if call.max_retries is None else min(call.max_retries, config.max_retries)
        self._attempts = attempts or Attempts(most, None if call.transfer else self._timeout_s)

    def request(self) -> httpx.Request:
        """Return the request of the next attempt, limited to the time left. Raises RequestTimeout."""
        request = httpx.Request(
            self._call.method,
            self._config.base_url + self._call.path,
            params=list(self._call.params) or None,
            headers={**self._config.headers(), **_trace(), **self._call.headers},
            extensions={"timeout": self._limits(self.check_time())},
            **self._call.payload,
        )
        request.headers.setdefault("Host", request.url.netloc.decode("ascii"))  # httpx omits it for streams
        return request

    def check_time(self) -> float:
        """Return the seconds left for the call, or between two bytes of a transfer. Raises RequestTimeout."""
        left_s = self._attempts.left_s()
        if left_s is not None and left_s <= 0:
            raise self._timed_out()
        return self._timeout_s if left_s is None else left_s

    def answered(self, reply: Reply) -> float | None:
        """Return None if the reply is final, or the seconds before the next attempt. Raises ApiError, ProtocolError."""
        if reply.status < 400 or self._already_deleted(reply):
            return None
        error = error_of(reply)
        retried = reply.status in RETRIED_STATUSES and error.code != QUOTA_EXCEEDED
        if retried and self._call.repeatable:
            pause_s = self._attempts.next_pause_s(error.retry_after_s)
            if pause_s is not None:
                return pause_s
        if reply.status == 503 and self._call.path == "/readyz":
            return None  # a valid answer: the body says what is missing
        raise error

    def broken(self, error: httpx.RequestError) -> float:
        """Return the seconds before the next attempt, after one without a response. Raises the caller's error."""
        if isinstance(error, httpx.DecodingError | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
            raise ProtocolError(f"{self._call}: {_reason(error)}") from error
        if self._call.repeatable or isinstance(error, NEVER_SENT):
            pause_s = self._attempts.next_pause_s()
            if pause_s is not None:
                return pause_s
        raise self._translated(error) from error

    def value(self, reply: Reply) -> T:
        """Read the final reply. Raises ProtocolError."""
        if 300 <= reply.status < 400:
            raise ProtocolError(f"{self._call}: redirected to {reply.headers.get('location')!r}; is the URL right?")
        try:
            return self._call.read(reply)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            raise ProtocolError(
                f"{self._call}: the answer is not a {error.title}: {where}: {first['msg']}, got {reply.content[:80]!r}"
            ) from error

    def _already_deleted(self, reply: Reply) -> bool:
        """Whether a retried DELETE met a 404: its first attempt may have worked, and its response was lost."""
        return self._call.method == "DELETE" and reply.status == 404 and self._attempts.retries > 0

    def _limits(self, left_s: float) -> dict[str, float]:
        return {"connect": min(CONNECT_TIMEOUT_S, left_s), "read": left_s, "write": left_s, "pool": left_s}

    def _translated(self, error: httpx.RequestError) -> LensrackError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return self._timed_out()
        failure = "no connection to" if isinstance(error, NEVER_SENT) else "the connection broke to"
        proxy = proxy_variable(self._config.base_url)
        through = f" through the proxy of {proxy}" if proxy else ""
        return ConnectError(f"{self._call}: {failure} {self._config.base_url}{through}: {_reason(error)}")

    def _timed_out(self) -> RequestTimeout:
        return RequestTimeout(f"{self._call}: no complete answer within {self._timeout_s:g} s")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def error_of(reply: Reply) -> ApiError:
    """Return the error class for a reply with a status of 400 or more, from lensrack or another server."""
    retry_after_s = parse_retry_after(reply.headers.get("retry-after"))
    try:
        problem = Problem.model_validate_json(reply.content)
    except ValidationError:
        problem = _foreign_problem(reply)
    request_id = problem.request_id or reply.headers.get("x-request-id", "")
    problem = problem.model_copy(update={"status": reply.status, "request_id": request_id})
    return ApiError.of(problem, retry_after_s=retry_after_s)


def _foreign_problem(reply: Reply) -> Problem:
    """Return a problem for the error page of a proxy or of another server."""
    known = reply.status in {status.value for status in HTTPStatus}
    title = HTTPStatus(reply.status).phrase if known else f"HTTP {reply.status}"
    return Problem(title=title, status=reply.status, detail=title, code=f"http_{reply.status}")


def read_as(model: type[M]) -> Callable[[Reply], M]:
    """Return a reader of JSON responses; its ValidationError becomes a ProtocolError."""
    return lambda reply: model.model_validate_json(reply.content)


def read_nothing(reply: Reply) -> None:
    """Read a response without content."""
