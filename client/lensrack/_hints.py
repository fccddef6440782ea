"""What the command line adds where a name may be misspelt: the nearest task, the nearest variable."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches

from .client import Client
from .errors import ApiError, LensrackError

VARIABLES = ("LENSRACK_URL", "LENSRACK_API_KEY", "LENSRACK_TIMEOUT", "LENSRACK_RETRIES")
SIMILAR = 0.85  # below it are settings of a server on the same machine, such as LENSRACK_KEYS


def misspelt_variables() -> Iterator[str]:
    """Yield a sentence for each variable of the environment that is nearly one of the SDK's."""
    for name in sorted(os.environ):
        near = get_close_matches(name.upper(), VARIABLES, 1, SIMILAR) if name.upper().startswith("LENSRACK_") else []
        if near and name not in VARIABLES:
            yield f"{name} has no effect: did you mean {near[0]}?"


def note_nearest_task(error: BaseException, client: Client) -> None:
    """Add a note with the name of the task that is nearest to the one that does not exist."""
    if not isinstance(error, ApiError) or error.code != "task_not_found":
        return
    try:
        tasks = [task.task for task in client.with_options(max_retries=0).tasks.list()]
    except LensrackError:
        return
    named = re.search(r"'([^'@]+)", error.detail)
    if named and (near := get_close_matches(named[1], tasks, 1)):
        error.add_note(f"did you mean {near[0]}?")
