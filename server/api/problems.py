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
_SHORT: Final = reprlib.Repr()  # of what may hold megabytes

Model = TypeVar("Model", bound=BaseModel)
_DIALECTS: Final[Mapping[str, Callable[[ServiceError], Mapping[str, Any]]]] = {"v1": openai.told, "v2": oip.told}

# where the store's failures stand among the service's; the first that fits counts, and what is not here is internal
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
# HTTP's own failures, as routing and the framework's parsers raise them
_CODES: Final = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class Answered(Response):
    """A problem as a response."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: wire.Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem.model_dump_json(), status_code=problem.status, headers=headers)


def service_error(error: Exception) -> ServiceError:
    """The same failure in the service's words. What was not foreseen is internal and says nothing of itself."""
    if isinstance(error, ServiceError):
        return error
    for kind, words in _STORE.items():
        if isinstance(error, kind):
            return words(error.detail, code=error.code)
    return errors.Internal("the server failed unexpectedly; its log has the details under this request id")


def problem(error: ServiceError, request_id: str) -> wire.Problem:
    """`extra` joins the standard members and cannot replace them."""
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
    """The answer to this request that it failed, in the words of whoever it is from."""
    headers = _headers(error)
    if (told := _DIALECTS.get(scope["path"].removeprefix("/").partition("/")[0])) is not None:
        return Response(json.dumps(told(error)), error.status, {**headers, CODE: error.code}, "application/json")
    return Answered(problem(error, scope["state"]["request_id"]), headers)


def _headers(error: ServiceError) -> dict[str, str]:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    if error.code == "too_many_connections":
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="lensrack"'
    return headers


def parsed(model: type[Model], body: bytes) -> Model:
    """A JSON body. Raises BadRequest for what is no JSON, Unprocessable for another than the model's."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if found[0]["type"] == "json_invalid":
            raise errors.BadRequest(f"expected a JSON body, got something else: {found[0]['msg']}") from error
        raise unprocessable(found) from error


def install(app: FastAPI) -> None:
    """Make every failure of this application a problem; the unforeseen ones are the trace middleware's."""
    app.add_exception_handler(ServiceError, _service)
    app.add_exception_handler(stored.StoreError, _service)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)


def _service(request: Request, error: Exception) -> Response:
    return answer(service_error(error), request.scope)


def _http(request: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    said = {
        404: f"nothing is served at {request.url.path[:200]!r}",
        405: f"{request.method} is not what {request.url.path[:200]!r} takes",
    }
    told = ServiceError(said.get(failure.status_code, str(failure.detail)))
    told.status, told.code = failure.status_code, _CODES.get(failure.status_code, "http_error")
    response = answer(told, request.scope)
    response.headers.update(failure.headers or {})
    return response


def _validation(request: Request, error: Exception) -> Response:
    found = cast(RequestValidationError, error).errors()
    if found and found[0]["type"] == "json_invalid":
        told: ServiceError = errors.BadRequest(f"expected a JSON body, got something else: {_syntax(found[0])}")
    else:
        told = unprocessable(found)
    return answer(told, request.scope)


def unprocessable(found: Sequence[Any]) -> errors.Unprocessable:
    """pydantic's findings as one error: field, what was expected, what came."""
    listed = [
        {"field": _field(one["loc"]), "expected": _expected(one), "actual": _actual(one.get("input"))}
        for one in found[:20]
    ]
    detail = "; ".join(f"{one['field']}: {one['expected']}, got {one['actual']}" for one in listed[:5])
    return errors.Unprocessable(detail, errors=listed)


def _syntax(found: Mapping[str, Any]) -> str:
    position = found["loc"][-1] if found["loc"] else 0
    return f"{found.get('ctx', {}).get('error', 'syntax error')} at character {position}"


def _field(location: Sequence[str | int]) -> str:
    named = [str(part) for part in location if part not in ("body", "query", "path", "header")]
    return ".".join(named) or "body"


def _expected(found: Mapping[str, Any]) -> str:
    message = str(found["msg"])
    if found["type"] == "extra_forbidden":
        return "expected no such field"
    return message.replace("Input should be", "expected").replace("Field required", "expected a value")


def _actual(value: object) -> str:
    """What came, short enough for an error."""
    if isinstance(value, dict | list):
        text = _SHORT.repr(value)
    else:
        text = repr(value[:101] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 100 else f"{text[:100]}…"
