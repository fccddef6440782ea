"""The way of nearly every request, `POST /predict/{task}`, past the router: the same route, called by its name.

    door, limits, turnstile ─► plain? ─ yes ─► scopes.require ─► services of the key ─► `predict.predict`
                                 └ no ──────► FastAPI's router, which ends at the same function

Finding a route among a hundred, solving its dependencies and unwinding their stacks costs more than all that a
prediction does on the event loop. Nothing is decided here that FastAPI would decide otherwise: what it would have to
validate (a query of anything but one small `top_k`) or to rewrite (a root path) goes its way.
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

TAKEN: Final = "/predict/{task}"
_PREFIX: Final = "/predict/"
_TOP_K: Final = re.compile(rb"(?:top_k=([1-9][0-9]{0,2}))?")
_USUAL: Final = 5
_ROUTE: Final = next(one for one in predict.router.routes if isinstance(one, APIRoute) and one.path == TAKEN)


class FastPath:
    """The innermost middleware: what stands before the routes stands before it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = _TOP_K.fullmatch(scope["query_string"]) if _plain(scope) else None
        if asked is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = _ROUTE
        request = Request(scope, receive, send)
        try:
            response = await _predicted(request, int(asked[1] or _USUAL))
        except (ServiceError, stored.StoreError) as error:
            response = problems.answer(problems.service_error(error), scope)
        await response(scope, receive, send)


def _plain(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["state"][TEMPLATE] == TAKEN
        and not scope.get("root_path")
    )


async def _predicted(request: Request, top_k: int) -> Response:
    await scopes.require(request)
    services = await services_of(request)
    refs = Ref.parse_all(request.scope["path"].removeprefix(_PREFIX))
    return await predict.predict(request, services, refs, top_k)
