"""The HTTP application: all routes, and the middleware that every request passes.

RootPath (a proxy's prefix, if set) ─▶ RequestLog (id, log, metrics, unexpected errors) ─▶ HeadAsGet ─▶
    AuthMiddleware (host, key, scope) ─▶ BodyLimit (unpacks, too) ─▶ AdmissionMiddleware (429 while the queue is full)
    ─▶ FastPath (plain predictions) or the router ─▶ routes, with services scoped to the key; every failure becomes a
    problem document
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from lensrack import wire
from server import __version__
from server.keys.authenticator import Authenticator

from . import params, problems, receiving, scopes
from .middleware import body_limit
from .middleware.admission import AdmissionMiddleware
from .middleware.auth import AuthMiddleware
from .middleware.fast_path import FastPath
from .middleware.head import HeadAsGet
from .middleware.request_log import RequestLog
from .middleware.root_path import RootPath
from .oip import routes as oip
from .openai import embeddings, files, jobs, models
from .routes import (
    aliases,
    attention,
    compare,
    datasets,
    exports,
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
from .shared_limiter import SharedLimiter
from .tenancy import services_by_key

__all__ = ["Services", "create_app"]

_PROBLEM: Final[dict[str, Any]] = {
    "description": "A problem (RFC 9457): see its `code`.",
    "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


_ROUTE_MODULES: Final = (
    *(predict, attention, tasks, exports, aliases, residency, rack),
    *(datasets, thumbnails, uploads, feedback, train, compare, health, session, ui),
    *(oip, files, jobs, models, embeddings),
)


def create_app(services: Services, authenticator: Authenticator) -> FastAPI:
    """Return the application over these services and keys, which their owner starts and closes."""
    receiving.sweep(services.settings.datasets_dir)
    root_path = services.settings.root_path
    app = FastAPI(
        title="lensrack",
        version=__version__,
        description="Many vision tasks from one frozen backbone, answered in one forward.",
        redirect_slashes=False,
        docs_url=None,  # `routes.ui` serves them, from this server's own files
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        middleware=[
            *([Middleware(RootPath, prefix=root_path)] if root_path else []),
            Middleware(RequestLog),
            Middleware(HeadAsGet),
            Middleware(AuthMiddleware, authenticator=authenticator, settings=services.settings),
            Middleware(
                body_limit.BodyLimit,
                cap=body_limit.caps(services.settings),
                patience=body_limit.patience(services.settings),
            ),
            Middleware(AdmissionMiddleware, queue=services.batcher),
            Middleware(FastPath),
        ],
        dependencies=[Depends(scopes.require), Depends(params.require_known_query)],
        responses={"default": _PROBLEM},
    )
    app.state.services, app.state.authenticator = services_by_key(services), authenticator
    app.state.root_path = root_path
    app.state.leaving = False  # set when the process begins to shut down
    app.state.ingests = SharedLimiter(datasets.INGESTS)
    app.state.parsing = SharedLimiter(oip.PARSING)
    app.state.exports = SharedLimiter(exports.AT_ONCE)
    app.state.thumbnails = SharedLimiter(thumbnails.AT_ONCE)
    problems.install(app)
    for module in _ROUTE_MODULES:
        app.include_router(module.router)
    app.openapi = lambda: _documented(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def _operation_id(route: APIRoute) -> str:
    """The name of an operation in generated clients: the function's, with that of its protocol."""
    return {"/v1": "openai_", "/v2": "oip_"}.get(route.path[:3], "") + route.name


def _documented(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, and the models of bodies that routes read themselves, which it does not know."""
    if app.openapi_schema is None:
        prefix = app.state.root_path
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=[{"url": prefix}] if prefix else None,
        )
        schemas = schema["components"]["schemas"]
        for model in (wire.Problem, wire.PredictRequest, embeddings.EmbeddingsRequest):
            definition = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(definition.pop("$defs", {}))
            schemas[model.__name__] = definition
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{}, {"key": []}]  # {}: a server without keys needs none
        app.openapi_schema = schema
    return app.openapi_schema
