"""Errors of the Open Inference Protocol: `{"error": sentence}`, which is all that its clients read."""

from __future__ import annotations

from server.errors import ServiceError


def error_body(error: ServiceError) -> dict[str, str]:
    return {"error": error.detail}
