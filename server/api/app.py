"""The HTTP application: every route, inside what is true of all of them.

Trace (id, log, metrics, the unforeseen) ─▶ Door (host, key, scope) ─▶ BodyLimit ─▶ Turnstile (is there room?) ─▶
    Shortcut (plain predictions) or the router ─▶ routes ─▶ what the key covers of predictor, residency, stores;
                                                                                      every failure ─▶ problems
"""

from __future__ import annotations

from typing import Any, Final

import anyio
from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware

from lensrack import wire
from server import __version__
from server.keys.authenticator import Authenticator

from . import problems, receiving, scopes
from .middleware import body_limit
from .middleware.admission import AdmissionMiddleware
from .middleware.auth import AuthMiddleware
from .middleware.fast_path import FastPath
from .middleware.request_log import RequestLog
from .oip import routes as oip
from .openai import embeddings, files, jobs, models
from .routes import (
    aliases,
    attention,
    compare,
    datasets,
    feedback,
    health,
    predict,
    rack,
    residency,
    session,
    tasks,
    thumbnails,
    train,
    ui,
    uploads,
)
from .services import Services
from .tenancy import scoping

__all__ = ["Services", "create_app"]

_PROBLEM: Final[dict[str, Any]] = {
    "description": "A problem (RFC 9457): see its `code`.",
    "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


_ROOMS: Final = (
    *(predict, attention, tasks, aliases, residency, rack),
    *(datasets, thumbnails, uploads, feedback, train, compare, health, session, ui),
    *(oip, files, jobs, models, embeddings),
)


def create_app(services: Services, ring: Authenticator) -> FastAPI:
    """The application over these services and keys. It starts and closes none of them: who made them does."""
    receiving.sweep(services.settings.datasets_dir)
    app = FastAPI(
        title="lensrack",
        version=__version__,
        description="Many vision tasks from one frozen backbone, answered in one forward.",
        redirect_slashes=False,
        middleware=[
            Middleware(RequestLog),
            Middleware(AuthMiddleware, ring=ring, settings=services.settings),
            Middleware(
                body_limit.BodyLimit,
                cap=body_limit.caps(services.settings),
                patience=body_limit.patience(services.settings),
            ),
            Middleware(AdmissionMiddleware, queue=services.batcher),
            Middleware(FastPath),
        ],
        dependencies=[Depends(scopes.require)],
        responses={"default": _PROBLEM},
    )
    app.state.services, app.state.ring = scoping(services), ring
    app.state.leaving = False  # set when the process is asked to end
    app.state.ingests = anyio.CapacityLimiter(datasets.INGESTS)
    app.state.parsing = anyio.CapacityLimiter(oip.PARSING)
    app.state.thumbnails = anyio.CapacityLimiter(thumbnails.AT_ONCE)
    problems.install(app)
    for room in _ROOMS:
        app.include_router(room.router)
    app.openapi = lambda: _documented(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def _documented(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, and the models that it cannot find by itself: those of bodies that routes read on their own."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = schema["components"]["schemas"]
        for model in (wire.Problem, wire.PredictRequest):
            found = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(found.pop("$defs", {}))
            schemas[model.__name__] = found
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]  # {}: a server that has no keys asks for none
        app.openapi_schema = schema
    return app.openapi_schema
