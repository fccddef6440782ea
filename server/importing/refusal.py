"""Errors of an import, and quoting of untrusted values in their messages."""

from __future__ import annotations

from server.errors import Unprocessable

MAX_QUOTED = 120


def refusal(detail: str, code: str = "bad_checkpoint") -> Unprocessable:
    return Unprocessable(detail, code=code)


def quoted(value: object) -> str:
    """An untrusted value as text for a message. A container becomes its type alone: written out, a list that contains
    another twice, which contains another twice, and so on, has no end."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a huge integer"
    text = repr(value[:MAX_QUOTED] if isinstance(value, str) else value)
    return text if len(text) <= MAX_QUOTED + 2 else f"{text[:MAX_QUOTED]}…"
