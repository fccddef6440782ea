"""Progress of uploads and jobs on stderr: a bar at a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from . import _archive, wire
from ._job_text import event_text, progress_of
from ._terminal import console, plain, say
from .client import JobHandle

LINE_EVERY_S = 1.7
"""Least seconds between two lines of progress where there is no terminal: with the next report, these are two."""

LASTING = ("trial", "published", "kept", "live_unusable", "retried")
"""Events whose lines stay above the bar."""


@contextmanager
def upload_bar(name: str) -> Iterator[_archive.Progress]:
    """Show a bar of the bytes sent; a retry starts it again."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True)) as bar:
        task = bar.add_task(f"packing {plain(name)}", total=None)

        def progress(sent: int, total: int | None) -> None:
            step = "storing" if sent == total else "sending"  # the server decodes every image before it answers
            bar.update(task, completed=sent, total=total, description=f"{step} {plain(name)}")

        yield progress


def watch(handle: JobHandle) -> wire.Job:
    """Show a job's progress until it has succeeded. Raises JobFailed."""
    if handle.job.finished:
        return handle.wait()
    if console(stderr=True).is_terminal:
        _watch_bar(handle)
    else:
        _watch_lines(handle)
    return handle.wait()


def _watch_bar(handle: JobHandle) -> None:
    """Show a bar of the share of the work that is done. Lines above it stay: finished trials and published versions."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(f"{plain(handle.job.task)}: {handle.state}", total=None, status="")
        for event in handle.events(progress=True):
            text = plain(event_text(handle.job, event))
            progress = progress_of(event) if event.type in ("epoch", "progress") else None
            if progress is not None:
                bar.update(task, description=plain(handle.job.task), status=text)
                if progress.share is not None:
                    bar.update(task, completed=progress.share, total=1.0)
            elif event.type in LASTING:
                bar.console.print(f"{plain(handle.job.task)}: {text}")
            else:
                bar.update(task, description=f"{plain(handle.job.task)}: {text}")


def _watch_lines(handle: JobHandle) -> None:
    said_at = 0.0
    for event in handle.events(progress=True):
        if event.type != "progress" or time.monotonic() - said_at >= LINE_EVERY_S:
            say(f"{handle.job.task}: {event_text(handle.job, event)}")
            said_at = time.monotonic()
