"""The most frequent request, `POST /predict/{task}`, bypasses the router and calls its route function directly.

    auth, limits, admission ─► plain? ─ yes ─► scopes.require ─► services of the key ─► `predict.predict`
                                 └ no ──────► FastAPI's router, which calls the same function

Matching a route among a hundred, solving its dependencies and unwinding their stacks costs more than all else that a
prediction does on the event loop. The fast path decides nothing that FastAPI would decide differently: a request that
needs validation (a query of anything but one small `top_k`) or a rewrite (a root path) takes the router.
"""

from __future__ import annotations

import re
from typing import Final

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import prompts_store as stored
from server.api import problems, scopes
from server.api.routes import predict
from server.api.services import services_of
from server.errors import ServiceError
from server.serving.resolver import Ref

from .auth import TEMPLATE

TEMPLATE_SERVED: Final = "/predict/{task}"
_PREFIX: Final = "/predict/"
_TOP_K: Final = re.compile(rb"(?:top_k=([1-9][0-9]{0,2}))?")
_DEFAULT_TOP_K: Final = 5
_ROUTE: Final = next(
    route for route in predict.router.routes if isinstance(route, APIRoute) and route.path == TEMPLATE_SERVED
)


class FastPath:
    """The innermost middleware: every check that comes before the routes comes before it, too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = _TOP_K.fullmatch(scope["query_string"]) if _plain(scope) else None
        if query is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = _ROUTE
        request = Request(scope, receive, send)
        try:
            response = await _predict(request, int(query[1] or _DEFAULT_TOP_K))
        except (ServiceError, stored.StoreError) as error:
            response = problems.answer(problems.service_error(error), scope)
        await response(scope, receive, send)


def _plain(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["state"][TEMPLATE] == TEMPLATE_SERVED
        and not scope.get("root_path")
    )


async def _predict(request: Request, top_k: int) -> Response:
    await scopes.require(request)
    services = await services_of(request)
    refs = Ref.parse_all(request.scope["path"].removeprefix(_PREFIX))
    return await predict.predict(request, services, refs, top_k)
