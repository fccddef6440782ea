"""The gRPC server: authentication, calls, errors, the log.

    metadata ─► a valid key? ─► with the call's scope? ─► message ─► services, scoped to the key ─► call
                    UNAUTHENTICATED, PERMISSION_DENIED: before the message is read

It lives on the event loop of the HTTP server. Connections are not encrypted, as HTTP's are not: a proxy does that.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from server.api import problems, scopes
from server.api.middleware import request_log
from server.api.services import Services
from server.errors import BadRequest, ServiceError
from server.keys.authenticator import Authenticator
from server.keys.key import NOBODY, Key
from server.observability import logs, metrics
from server.settings import Settings

from .calls import CALLS, Answer, Call
from .messages import SERVICE, methods

log = logging.getLogger(logs.REQUESTS)

Code = grpc.StatusCode
METHOD: Final = "GRPC"  # in metrics, where HTTP has GET and POST
OVERHEAD_BYTES: Final = 64 * 1024  # of a message, beside its tensors
_CODES: Final = {
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    409: Code.FAILED_PRECONDITION,
    413: Code.RESOURCE_EXHAUSTED,
    429: Code.RESOURCE_EXHAUSTED,
    501: Code.UNIMPLEMENTED,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
    507: Code.RESOURCE_EXHAUSTED,
}


def status_of(error: ServiceError) -> grpc.StatusCode:
    return _CODES.get(error.status, Code.INTERNAL if error.status >= 500 else Code.INVALID_ARGUMENT)


@dataclass
class _LoggedCall:
    """One call, for the log and the metrics."""

    route: str
    id: str
    key: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 499  # the client left before the response

    @classmethod
    def of(cls, details: Any) -> _LoggedCall:
        metadata = {name: value for name, value in details.invocation_metadata or () if isinstance(value, str)}
        id_ = metadata.get("x-request-id", "")
        id_ = id_ if request_log.SANE.fullmatch(id_) else uuid.uuid4().hex
        return cls(details.method, id_, metadata.get("lensrack-key") or id_)

    def record(self) -> None:
        took_s = time.perf_counter() - self.started
        metrics.REQUESTS.labels(self.route, METHOD, str(self.status)).inc()
        metrics.REQUEST_S.labels(self.route).observe(took_s)
        fields = logs.fields(method=METHOD, route=self.route, status=self.status, took_ms=round(1000 * took_s, 3))
        line = "%s %s %d %.1f ms %s"
        level = request_log.level_of(self.status)
        log.log(level, line, METHOD, self.route, self.status, 1000 * took_s, self.id, extra=fields)


class _AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc carries no types
    """Finds each call's key before its message is read. Calls that are not in CALLS stay unimplemented."""

    def __init__(self, services_by_key: Callable[[Key | None], Services], authenticator: Authenticator) -> None:
        self._services_by_key, self._authenticator, self._messages = services_by_key, authenticator, methods()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        service, _, name = details.method.removeprefix("/").partition("/")
        if service != SERVICE or name not in CALLS:
            return await continuation(details)
        logged, (answer, method, route) = _LoggedCall.of(details), CALLS[name]
        try:
            services = self._services_by_key(await self._authorized_key(details, scopes.need_of(method, route)))
        except Exception as error:
            failure = error

            async def refuse(_: Any, context: Any) -> None:
                async with _logged(logged, context):
                    raise failure

            return grpc.stream_unary_rpc_method_handler(refuse)  # which reads nothing of what is sent

        request, response = self._messages[name]
        call = _call(answer, request, services, logged)
        return grpc.unary_unary_rpc_method_handler(call, None, response.SerializeToString)

    async def _authorized_key(self, details: Any, need: scopes.Need) -> Key | None:
        """Raises Unauthenticated, Forbidden."""
        token = _bearer(details)
        await self._authenticator.refresh()
        key: Key | None = NOBODY
        if self._authenticator.locked:
            key = await self._authenticator.owner(token) if token else None
        scopes.require_need(key, need, details.method, token_sent=token is not None)
        return key


def _call(answer: Answer, kind: Any, services: Services, logged: _LoggedCall) -> Callable[[Any, Any], Any]:
    async def call(sent: bytes, context: Any) -> Any:
        async with _logged(logged, context):
            return await answer(_read(kind, sent), Call(services, context.time_remaining(), logged.key))

    return call


def _read(kind: Any, sent: bytes) -> Any:
    """Parsed here and not by grpc, which would send the exception's class to the client. Raises BadRequest."""
    try:
        return kind.FromString(sent)
    except DecodeError as error:
        raise BadRequest(f"expected a message {kind.DESCRIPTOR.name}, got {len(sent)} bytes that are none") from error


@asynccontextmanager
async def _logged(logged: _LoggedCall, context: Any) -> AsyncIterator[None]:
    """Set the call's id on log lines and response, turn its failure into a status, and log it."""
    try:
        with logs.context(logs.REQUEST_ID, logged.id):
            try:
                yield
                logged.status = 200
                context.set_trailing_metadata((("x-request-id", logged.id),))
            except Exception as error:
                failure = problems.service_error(error)
                if failure is not error and failure.status == 500:
                    logging.getLogger(__name__).exception("call %s failed", logged.id)
                logged.status = failure.status
                await context.abort(status_of(failure), failure.detail, _trailing(failure, logged))
    finally:
        logged.record()


def _trailing(error: ServiceError, logged: _LoggedCall) -> tuple[tuple[str, str], ...]:
    metadata = [("x-request-id", logged.id), (problems.CODE.lower(), error.code)]
    if error.retry_after_s is not None:
        metadata.append(("retry-after", str(math.ceil(error.retry_after_s))))
    return tuple(metadata)


def _bearer(details: Any) -> str | None:
    for name, value in details.invocation_metadata or ():
        scheme, _, token = value.partition(" ") if name == "authorization" and isinstance(value, str) else ("", "", "")
        if scheme.lower() == "bearer" and token.strip():
            return str(token.strip())
    return None


class GrpcServer:
    """Created and run on one event loop. `port` 0 takes a free one, which `start` returns."""

    def __init__(
        self,
        services_by_key: Callable[[Key | None], Services],
        authenticator: Authenticator,
        settings: Settings,
        port: int,
    ) -> None:
        self._services_by_key, self._authenticator, self._settings, self._port = (
            services_by_key,
            authenticator,
            settings,
            port,
        )
        self._server: Any = None

    async def start(self) -> int:
        """Return the port that the server listens on. Raises OSError."""
        self._server = grpc.aio.server(
            interceptors=[_AuthInterceptor(self._services_by_key, self._authenticator)],
            maximum_concurrent_rpcs=self._settings.max_queue,
            options=[
                ("grpc.so_reuseport", 0),  # a port that is taken is an error, and not shared
                ("grpc.max_receive_message_length", self._settings.max_body_bytes + OVERHEAD_BYTES),
            ],
        )
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._port}")
        except RuntimeError as error:
            raise OSError(f"LENSRACK_GRPC_PORT: cannot listen on {host}:{self._port}") from error
        await self._server.start()
        return int(port)

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls, and answer those under way for at most `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)
