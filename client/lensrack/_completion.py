"""What the shell offers after a TAB, asked of the server: names of tasks, ids of datasets and jobs.

Installed by `lensrack --install-completion`, which is Typer's. A server that does not answer at once offers nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from . import Client
from .errors import LensrackError

PATIENCE_S = 1.5  # as long as somebody bears a TAB to take

Offer = tuple[str, str]  # what completes the word, and a word about it


def tasks(context: typer.Context, incomplete: str) -> list[Offer]:
    return _offered(context, incomplete, lambda client: [(one.task, one.method or "") for one in client.tasks.list()])


def datasets(context: typer.Context, incomplete: str) -> list[Offer]:
    return _offered(context, incomplete, lambda client: [(one.id, one.name) for one in client.datasets.list()])


def jobs(context: typer.Context, incomplete: str) -> list[Offer]:
    return _offered(
        context, incomplete, lambda client: [(one.id, f"{one.task} {one.state}") for one in client.jobs.list().jobs]
    )


def _offered(context: typer.Context, incomplete: str, ask: Callable[[Client], list[Offer]]) -> list[Offer]:
    given = context.find_root().params
    try:
        with Client(given.get("url"), given.get("api_key"), timeout=PATIENCE_S, max_retries=0) as client:
            return [offer for offer in ask(client) if offer[0].startswith(incomplete)]
    except (LensrackError, OSError):
        return []
