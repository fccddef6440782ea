"""Pages as OpenAI's clients read them: `after` is the id of the last item seen, `has_more` says whether to go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import NotFound


def page(items: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": list(items), "has_more": has_more, "first_id": first, "last_id": last}


def cut(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Return a page of all items. Raises NotFound for an `after` that is not among them."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise NotFound(f"after: expected the id of a listed item, got {after[:100]!r}", param="after")
    rest = items[ids.index(after) + 1 :] if after is not None else items
    return page(rest[:limit], len(rest) > limit)
