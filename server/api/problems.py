"""Every failure as an RFC 9457 problem document: `application/problem+json`, a stable code, the request's id.

Under the paths of a dialect it is the dialect's error body instead, and the code goes into `Lensrack-Code`.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

import prompts_store as stored
from lensrack import wire
from server import errors
from server.errors import ServiceError

from .oip import faults as oip
from .openai import faults as openai

MEDIA_TYPE: Final = "application/problem+json"
CODE: Final = "Lensrack-Code"
_SHORT: Final = reprlib.Repr()  # a value may have megabytes

Model = TypeVar("Model", bound=BaseModel)
_DIALECTS: Final[Mapping[str, Callable[[ServiceError], Mapping[str, Any]]]] = {
    "v1": openai.error_body,
    "v2": oip.error_body,
}

# each store error as a service error; the first that matches counts, others are internal
_STORE: Final[Mapping[type[stored.StoreError], type[ServiceError]]] = {
    stored.BundleError: errors.BadRequest,
    stored.BadAlias: errors.Unprocessable,
    stored.TaskNotFound: errors.NotFound,
    stored.VersionNotFound: errors.NotFound,
    stored.AliasNotFound: errors.NotFound,
    stored.AliasConflict: errors.Conflict,
    stored.VersionInUse: errors.Conflict,
    stored.NoHistory: errors.Conflict,
    stored.StoreFull: errors.DiskFull,
    stored.StoreUnavailable: errors.Unavailable,
    stored.CorruptBundle: errors.Internal,
    stored.CorruptAliases: errors.Internal,
}
# codes of HTTP errors that routing and the framework's parsers raise
_CODES: Final = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class ProblemResponse(Response):
    """A problem document as a response."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: wire.Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem.model_dump_json(), status_code=problem.status, headers=headers)


def service_error(error: Exception) -> ServiceError:
    """Return an error as a ServiceError. An unexpected one becomes `internal`, without its details."""
    if isinstance(error, ServiceError):
        return error
    for store_error, service_error_ in _STORE.items():
        if isinstance(error, store_error):
            return service_error_(error.detail, code=error.code)
    return errors.Internal("the server failed unexpectedly; its log has the details under this request id")


def problem(error: ServiceError, request_id: str) -> wire.Problem:
    """Return the problem document. `extra` joins the standard members and cannot replace them."""
    return wire.Problem.model_validate(
        {
            **error.extra,
            "title": HTTPStatus(error.status).phrase,
            "status": error.status,
            "detail": error.detail,
            "code": error.code,
            "request_id": request_id,
        }
    )


def answer(error: ServiceError, scope: Scope) -> Response:
    """Return the response to a request that failed, in the dialect of its path."""
    headers = _headers(error)
    if (error_body := _DIALECTS.get(scope["path"].removeprefix("/").partition("/")[0])) is not None:
        return Response(json.dumps(error_body(error)), error.status, {**headers, CODE: error.code}, "application/json")
    return ProblemResponse(problem(error, scope["state"]["request_id"]), headers)


def _headers(error: ServiceError) -> dict[str, str]:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    if error.code == "too_many_connections":
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="lensrack"'
    return headers


def parse_json(model: type[Model], body: bytes) -> Model:
    """Return a JSON body as `model`. Raises BadRequest for anything but JSON, Unprocessable where it does not fit."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        findings = error.errors(include_url=False)
        if findings[0]["type"] == "json_invalid":
            raise errors.BadRequest(f"expected a JSON body, got something else: {findings[0]['msg']}") from error
        raise unprocessable(findings) from error


def install(app: FastAPI) -> None:
    """Answer every failure of `app` with a problem; unexpected ones are caught by `middleware.request_log`."""
    app.add_exception_handler(ServiceError, _service)
    app.add_exception_handler(stored.StoreError, _service)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)


def _service(request: Request, error: Exception) -> Response:
    return answer(service_error(error), request.scope)


def _http(request: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    details = {
        404: f"nothing is served at {request.url.path[:200]!r}",
        405: f"{request.url.path[:200]!r} does not take {request.method}",
    }
    problem_error = ServiceError(details.get(failure.status_code, str(failure.detail)))
    problem_error.status, problem_error.code = failure.status_code, _CODES.get(failure.status_code, "http_error")
    response = answer(problem_error, request.scope)
    response.headers.update(failure.headers or {})
    if response.headers.get("Allow") == "GET":
        response.headers["Allow"] = "GET, HEAD"  # see `middleware.head`
    return response


def _validation(request: Request, error: Exception) -> Response:
    findings = cast(RequestValidationError, error).errors()
    if findings and findings[0]["type"] == "json_invalid":
        detail = f"expected a JSON body, got something else: {_syntax(findings[0])}"
        return answer(errors.BadRequest(detail), request.scope)
    return answer(unprocessable(findings), request.scope)


def unprocessable(findings: Sequence[Any]) -> errors.Unprocessable:
    """Return pydantic's findings as one error; each names the field, the expected and the actual value."""
    fields = [
        {"field": _field(finding["loc"]), "expected": _expected(finding), "actual": _actual(finding.get("input"))}
        for finding in findings[:20]
    ]
    detail = "; ".join(f"{field['field']}: {field['expected']}, got {field['actual']}" for field in fields[:5])
    return errors.Unprocessable(detail, errors=fields)


def _syntax(finding: Mapping[str, Any]) -> str:
    position = finding["loc"][-1] if finding["loc"] else 0
    return f"{finding.get('ctx', {}).get('error', 'syntax error')} at character {position}"


def _field(location: Sequence[str | int]) -> str:
    parts = [str(part) for part in location if part not in ("body", "query", "path", "header")]
    return ".".join(parts) or "body"


def _expected(finding: Mapping[str, Any]) -> str:
    message = str(finding["msg"])
    if finding["type"] == "extra_forbidden":
        return "expected no such field"
    return message.replace("Input should be", "expected").replace("Field required", "expected a value")


def _actual(value: object) -> str:
    """The value, short enough for an error."""
    if isinstance(value, dict | list):
        text = _SHORT.repr(value)
    else:
        text = repr(value[:101] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 100 else f"{text[:100]}…"
