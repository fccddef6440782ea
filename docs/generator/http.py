"""The HTTP API: its OpenAPI document, and the same as a readable page."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, cast

from docs.generator.markdown import table
from server.api.app import create_app
from server.api.scopes import need_of
from server.api.services import Services
from server.keys.authenticator import Authenticator
from server.keys.url import open_keys
from server.settings import Settings

HEAD = """# HTTP

A running server has the same documentation at `/docs` and the schema at `/openapi.json`.
[This version's schema](openapi.json).
On a server with keys every request needs `Authorization: Bearer lr_…`, and the key needs the scope named here.
`HEAD` is supported wherever `GET` is, with the same status and headers.

- Pictures and archives are recognised by their content. A body without a content type, as `application/octet-stream`,
  under any `image/…` or as curl's own default is looked into; JSON, NumPy and forms are what they declare.
- A form's pictures are in the field `images`, or all in one other field; parts need no filename.
- Bodies may be packed: `Content-Encoding: gzip` or `deflate`. Limits count what they unpack to.
- A query parameter that a route does not know is a 422 that names the nearest one. `/v1`, `/v2` and probes ignore it.
- Clients can be generated from the schema. Every operation has a readable id, and every picture or archive can be sent
  as `application/octet-stream`.
"""


class _NoService:
    """Stands for every service: routes are described and never called."""

    def __getattr__(self, name: str) -> Any:
        return None


def schema() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home))
        stubs = dict.fromkeys(Services.__dataclass_fields__, _NoService())
        stubs = {name: stub for name, stub in stubs.items() if name not in ("tenant", "key", "meter")}
        services = Services(**cast(dict[str, Any], {**stubs, "settings": settings}))
        app = create_app(services, Authenticator(open_keys(settings.keys_url), None))
        return app.openapi()


def text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def page(document: dict[str, Any]) -> str:
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["other"])[0]
            by_tag.setdefault(tag, []).append(_operation(method.upper(), path, operation))
    return HEAD + "".join(f"\n## {tag[0].upper()}{tag[1:]}\n{''.join(parts)}" for tag, parts in by_tag.items())


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    description = operation.get("description") or operation.get("summary", "")
    body = operation.get("requestBody", {}).get("content", {})
    lines = [f"\n### {method} {path}\n", f"Scope: {need_of(method, path)}.", "", description, ""]
    if body:
        kinds = [f"`{kind}`{_named(what)}" for kind, what in body.items()]
        lines += [f"Body: {', '.join(kinds)}", ""]
    rows = [_parameter(parameter) for parameter in operation.get("parameters", []) if parameter["in"] != "path"]
    lines += [table(("parameter", "in", "meaning"), rows)] if rows else []
    answers = [
        f"{status}{_named(content)}"
        for status, answer in operation["responses"].items()
        if status.startswith("2")
        for content in (answer.get("content") or {"": {}}).values()
    ]
    return "\n".join([*lines, f"Answers: {', '.join(answers)}; otherwise a [problem](errors.md).\n"])


def _named(content: dict[str, Any]) -> str:
    reference = content.get("schema", {}).get("$ref", "")
    return f" {reference.rpartition('/')[2]}" if reference else ""


def _parameter(parameter: dict[str, Any]) -> tuple[str, str, str]:
    default = parameter.get("schema", {}).get("default")
    description = parameter.get("description", "")
    meaning = description if default is None else f"{description} Default: `{json.dumps(default)}`.".strip()
    return f"`{parameter['name']}`{' (required)' if parameter.get('required') else ''}", parameter["in"], meaning
