"""Shell completion from the server: names of tasks, ids of datasets and jobs.

Typer's `lensrack --install-completion` installs it. If the server does not answer quickly, nothing is completed.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from . import Client
from .errors import LensrackError

TIMEOUT_S = 1.5  # the longest that a TAB should take

Completion = tuple[str, str]  # a completion and its description


def tasks(context: typer.Context, incomplete: str) -> list[Completion]:
    return _completions(
        context, incomplete, lambda client: [(task.task, task.method or "") for task in client.tasks.list()]
    )


def datasets(context: typer.Context, incomplete: str) -> list[Completion]:
    return _completions(
        context, incomplete, lambda client: [(dataset.id, dataset.name) for dataset in client.datasets.list()]
    )


def jobs(context: typer.Context, incomplete: str) -> list[Completion]:
    return _completions(
        context, incomplete, lambda client: [(job.id, f"{job.task} {job.state}") for job in client.jobs.list().jobs]
    )


def _completions(
    context: typer.Context, incomplete: str, fetch: Callable[[Client], list[Completion]]
) -> list[Completion]:
    options = context.find_root().params
    try:
        with Client(options.get("url"), options.get("api_key"), timeout=TIMEOUT_S, max_retries=0) as client:
            return [completion for completion in fetch(client) if completion[0].startswith(incomplete)]
    except (LensrackError, OSError):
        return []
