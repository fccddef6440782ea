"""An error as OpenAI's clients read it: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any, Final

from server.errors import ServiceError

RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "What went wrong; `code` is stable.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": "string"},
                            },
                        }
                    },
                }
            }
        },
    }
}
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: ServiceError) -> dict[str, Any]:
    """Return the body of an error. `param`: the field that is wrong, where there is one."""
    fields: Any = error.extra.get("errors")
    param = fields[0]["field"] if fields else error.extra.get("param")
    return {"error": {"message": error.detail, "type": _type(error.status), "param": param, "code": error.code}}


def _type(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
