"""The key that each route needs. A route that is not listed needs `admin`, so that a forgotten one is closed.

open      no key                   whole     any key for all tasks: the answer is about all tenants
any       a key of any scope       predict, train, admin: a key with that scope

`check` runs twice for each request: before its body is read, with the listed route that its path looks like
(`template`), and with the route that FastAPI has matched (`require`). The first refuses early and may be wrong about
an unlisted route whose path looks like a listed one; the second decides about the route that really runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from fastapi import Request
from starlette.routing import compile_path
from starlette.types import Scope

from server.errors import Forbidden, Unauthenticated
from server.keys.key import SCOPES, Key

Need = Literal["open", "any", "whole", "predict", "train", "admin"]

_LISTED: Final[Mapping[Need, str]] = {
    "open": """
        GET /healthz
        GET /readyz
        GET /v2/health/live
        GET /v2/health/ready
        GET /
        GET /ui/{path:path}
        GET /session
        POST /session
        DELETE /session
    """,
    "whole": """
        GET /metrics
    """,
    "any": """
        GET /openapi.json
        GET /docs
        GET /methods
        GET /rack
        GET /tasks
        GET /tasks/{task}
        GET /tasks/{task}/versions
        GET /tasks/{task}/versions/{version}
        GET /tasks/{task}/aliases/{alias}
        GET /tasks/{task}/aliases/{alias}/history
        GET /v2
        GET /v2/models/{task}
        GET /v2/models/{task}/ready
        GET /v2/models/{task}/versions/{version}
        GET /v2/models/{task}/versions/{version}/ready
        POST /v2/repository/index
        GET /v1/models
        GET /v1/models/{task}
    """,
    "predict": """
        POST /predict
        POST /predict/{task}
        POST /embed
        POST /v1/embeddings
        POST /v2/models/{task}/infer
        POST /v2/models/{task}/versions/{version}/infer
        POST /tasks/{task}/attention
        POST /tasks/{task}/feedback
    """,
    "train": """
        GET /tasks/{task}/versions/{version}/bundle
        GET /tasks/{task}/versions/{version}/export
        GET /tasks/{task}/feedback
        DELETE /tasks/{task}/feedback/{sha256}
        POST /tasks/{task}/feedback/dataset
        POST /datasets
        GET /datasets
        GET /datasets/{dataset_id}
        DELETE /datasets/{dataset_id}
        GET /datasets/{dataset_id}/thumbnails
        GET /datasets/{dataset_id}/thumbnails/{number}
        OPTIONS /uploads
        POST /uploads
        HEAD /uploads/{upload_id}
        PATCH /uploads/{upload_id}
        DELETE /uploads/{upload_id}
        POST /train
        GET /train
        GET /train/{job_id}
        POST /train/{job_id}/cancel
        GET /train/{job_id}/events
        POST /compare
        GET /compare/{job_id}
        POST /v1/files
        GET /v1/files
        GET /v1/files/{dataset_id}
        DELETE /v1/files/{dataset_id}
        POST /v1/fine_tuning/jobs
        GET /v1/fine_tuning/jobs
        GET /v1/fine_tuning/jobs/{job_id}
        GET /v1/fine_tuning/jobs/{job_id}/events
        POST /v1/fine_tuning/jobs/{job_id}/cancel
    """,
    "admin": """
        DELETE /tasks/{task}
        PUT /tasks/{task}/versions
        DELETE /tasks/{task}/versions/{version}
        PUT /tasks/{task}/aliases/{alias}
        DELETE /tasks/{task}/aliases/{alias}
        POST /tasks/{task}/rollback
        POST /tasks/{task}/load
        POST /tasks/{task}/unload
        POST /tasks/{task}/pin
        POST /v2/repository/models/{task}/load
        POST /v2/repository/models/{task}/unload
    """,
}
NEEDS: Final[Mapping[tuple[str, str], Need]] = {
    (line.split()[0], line.split()[1]): need for need, lines in _LISTED.items() for line in lines.strip().splitlines()
}


_METHODS: Final = frozenset(method for method, _ in NEEDS)
_TEMPLATES: Final = {
    method: tuple((compile_path(route)[0], route) for listed, route in NEEDS if listed == method) for method in _METHODS
}


def match(method: str, path: str) -> tuple[str | None, str]:
    """Return the listed route that a path looks like, None for none, and the task that it names, "" for none.

    The task comes without an alias or a version: who is admitted depends on it before the route parses the reference.
    """
    for candidate in (method, "GET") if method == "HEAD" else (method,):
        for pattern, route in _TEMPLATES.get(candidate, ()):
            if matched := pattern.match(path):
                return route, matched.groupdict().get("task", "").partition("@")[0]
    return None, ""


def need_of(method: str, route: str) -> Need:
    if method == "HEAD" and (method, route) not in NEEDS:
        method = "GET"
    return NEEDS.get((method, route), "admin")


def check(scope: Scope, route: str | None, *, token_sent: bool) -> None:
    """Check that the request's key may use a route. `token_sent`: it carried a token, valid or not.

    Without a route any key will do: either nothing is there, or `require` checks the route that FastAPI matches.
    Raises Unauthenticated, Forbidden.
    """
    key: Key | None = scope["state"]["key"]
    need = "any" if route is None else need_of(scope["method"], route)
    if need == "whole" and scope["state"]["open_metrics"]:
        return
    require_need(key, need, f"{scope['method']} {scope['path'][:200]!r}", token_sent=token_sent)


def require_need(key: Key | None, need: Need, what: str, *, token_sent: bool) -> None:
    """Check that a key may do `what`. Raises Unauthenticated, Forbidden."""
    if need == "open":
        return
    if key is None:
        got = "one that is wrong, revoked or unknown" if token_sent else "none"
        raise Unauthenticated(f"expected an API key (Authorization: Bearer …), got {got}")
    if need == "whole" and key.tasks:
        raise Forbidden("this describes all tasks: expected a key for all of them, got one for some")
    if (lacking := _missing(key, need)) is not None:
        raise Forbidden(f"{what} needs the scope {lacking!r}, which this key does not have", scope=lacking)


async def require(request: Request) -> None:
    """Check the route that FastAPI has matched: the first dependency of all routes."""
    check(request.scope, request.scope["route"].path, token_sent=False)


def _missing(key: Key, need: Need) -> str | None:
    return need if need in SCOPES and not key.may(need) else None
