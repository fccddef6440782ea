"""What an import says when it cannot be done."""

from __future__ import annotations

from server.errors import Unprocessable

MOST_SHOWN = 120


def refused(detail: str, code: str = "bad_checkpoint") -> Unprocessable:
    return Unprocessable(detail, code=code)


def shown(value: object) -> str:
    """A value of a stranger's for a message. Of what holds other values only the kind is told: written out, a list that
    holds another twice, which holds another twice, and so on, has no end."""
    if not isinstance(value, str | int | float | bool | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a huge integer"
    text = repr(value[:MOST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN + 2 else f"{text[:MOST_SHOWN]}…"
