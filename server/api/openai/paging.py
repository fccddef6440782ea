"""Pages as OpenAI's clients turn them: `after` is the id of the last one seen, `has_more` says whether to go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import NotFound


def page(found: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    first, last = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return {"object": "list", "data": list(found), "has_more": has_more, "first_id": first, "last_id": last}


def cut(found: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A page of what is at hand as a whole. Raises NotFound for an `after` that is not among it."""
    ids = [one["id"] for one in found]
    if after is not None and after not in ids:
        raise NotFound(f"after: expected the id of one that was listed, got {after[:100]!r}", param="after")
    rest = found[ids.index(after) + 1 :] if after is not None else found
    return page(rest[:limit], len(rest) > limit)
