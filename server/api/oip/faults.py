"""A failure in the protocol's words: `{"error": sentence}` and nothing else, which is all that its clients read."""

from __future__ import annotations

from server.errors import ServiceError


def told(error: ServiceError) -> dict[str, str]:
    return {"error": error.detail}
