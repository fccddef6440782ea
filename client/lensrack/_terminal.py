"""What the command line prints: answers to stdout, everything about them to stderr.

What comes from the server is shown with its control characters made visible, so that no label can play with a terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from . import wire
from .errors import (
    ApiError,
    AuthenticationError,
    ConnectError,
    DeadlineError,
    InvalidInput,
    LensrackError,
    RateLimitedError,
    RequestTimeout,
    ServerError,
    UnavailableError,
)

COPIES_SHOWN = 5  # of the pictures that a warning is about; --json tells all that the server lists
PIPED_WIDTH = 400  # nobody looks at a pipe: no column needs to be cut

_NEXT = {
    "task_not_found": "`lensrack tasks list` shows the tasks there are",
    "version_not_found": "`lensrack versions TASK` shows the versions there are",
    "alias_not_found": "`lensrack tasks show TASK` shows the aliases there are",
    "dataset_not_found": "`lensrack datasets list` shows the datasets there are",
    "job_not_found": "`lensrack jobs list` shows the jobs there are",
    "version_in_use": "point its aliases elsewhere first: `lensrack alias TASK ALIAS VERSION`",
    "wrong_backbone": "use a server that runs the bundle's backbone, or train the task on this one",
    "unknown_label": "check the label, or give --new-label",
    "no_feedback": "`lensrack feedback TASK IMAGE --label LABEL` says what an image shows",
    "no_parent_dataset": "name one of `lensrack datasets list` with --parent",
    "upload_not_found": "begin again without --resume",
    "job_finished": "there is nothing left to cancel",
    "unsupported_media_type": "send JPEG, PNG, WebP or BMP images; zip, tar, tar.gz, tar.zst, parquet or npz datasets",
    "unsupported_image": "send JPEG, PNG, WebP or BMP",
    "bad_image": "check that the file opens in an image viewer",
    "not_ready": "`lensrack health` says what the server is waiting for",
}


def plain(text: object) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line about the answer, for the person at the terminal."""
    print(plain(text), file=sys.stderr)


def print_json(value: BaseModel | Sequence[BaseModel] | dict[str, Any] | list[dict[str, Any]]) -> None:
    print(json.dumps(_dumped(value), ensure_ascii=False, indent=2))


def _dumped(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return [_dumped(item) for item in value] if isinstance(value, list | tuple) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Rows under a heading; where there are none, a word about that to stderr."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("-" if cell is None else plain(cell) for cell in row))
    if table.row_count:
        _print_table(table)
    else:
        say(empty)


def print_fields(fields: dict[str, object]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in fields.items():
        table.add_row(name, "-" if value is None or value == "" else plain(value))
    _print_table(table)


def _print_table(table: Table) -> None:
    """Without the blanks that fill the last column up: nobody wants them in a pipe."""
    stdout = console()
    with stdout.capture() as drawn:
        stdout.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def exit_code(error: LensrackError | OSError) -> int:
    """1: it failed. 2: the command is wrong, nothing was sent. 3: no answer now, try again later."""
    if isinstance(error, InvalidInput):
        return 2
    later = (ConnectError, RequestTimeout, RateLimitedError, UnavailableError, DeadlineError)
    return 3 if isinstance(error, later) else 1


def print_error(error: LensrackError | OSError, about: str = "") -> None:
    """One line: what happened, to what, and what to do next."""
    advice = _advice(error)
    text = _described(error) if isinstance(error, ApiError) else str(error)
    say(f"error: {f'{about}: ' if about else ''}{text}{f' - {advice}' if advice else ''}")


def _described(error: ApiError) -> str:
    return f"{error.code}: {error.detail}"


def _advice(error: LensrackError | OSError) -> str:
    if isinstance(error, ConnectError):
        return "is the server running? Start it with `make serve`, or name another with --url or LENSRACK_URL"
    if isinstance(error, RequestTimeout):
        return "the server may be busy: try again"
    if isinstance(error, AuthenticationError):
        return "give the server's API key with --api-key or LENSRACK_API_KEY"
    return _next_step(error) if isinstance(error, ApiError) else ""


def _next_step(error: ApiError) -> str:
    if error.code in _NEXT:
        return _NEXT[error.code]
    if error.retry_after_s is not None:
        return f"try again in {error.retry_after_s:g} s"
    if isinstance(error, ServerError):
        return f"the server's log tells more under request id {error.request_id or 'unknown'}"
    return ""


# --- one view for each thing ------------------------------------------------------------------------------------------


def when(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def targets(alias: wire.Alias) -> str:
    return ", ".join(
        target.version[:12] + (f" {target.weight:.0%}" if len(alias.targets) > 1 else "") for target in alias.targets
    )


def show_tasks(tasks: Sequence[wire.Task]) -> None:
    rows = [
        (task.task, task.live and task.live[:12], task.versions, "yes" if task.resident else "no") for task in tasks
    ]
    print_table(("task", "live", "versions", "resident"), rows, "no tasks yet: `lensrack train` makes one")


def show_task(task: wire.Task) -> None:
    aliases = {f"alias {alias.name}": f"{targets(alias)} (etag {alias.etag})" for alias in task.aliases}
    print_fields({"task": task.task, "versions": task.versions, "resident": task.resident, **aliases})


def show_versions(versions: Sequence[wire.VersionInfo]) -> None:
    rows = [
        (one.version[:12], one.method, len(one.labels), size(one.bytes), when(one.created_at), _metrics(one.metrics))
        for one in versions
    ]
    print_table(("version", "method", "labels", "size", "made", "metrics"), rows, "no versions")


def show_alias(task: str, alias: wire.Alias) -> None:
    print_fields({"task": task, "alias": alias.name, "version": targets(alias), "etag": alias.etag})


def show_datasets(datasets: Sequence[wire.Dataset]) -> None:
    rows = [(one.id, one.name, len(one.labels), one.images, size(one.bytes), when(one.created_at)) for one in datasets]
    columns = ("dataset", "name", "labels", "images", "size", "made")
    print_table(columns, rows, "no datasets yet: `lensrack datasets upload FOLDER` stores one")


def show_dataset(dataset: wire.Dataset) -> None:
    counts = {f"{split}/{label}": n for split, labels in dataset.splits.items() for label, n in labels.items()}
    head = {
        "dataset": dataset.id,
        "name": dataset.name,
        "parent": dataset.parent,
        "images": dataset.images,
        "size": size(dataset.bytes),
    }
    print_fields({**head, **counts, **_made_of(dataset.report), "skipped": len(dataset.skipped)})
    _say_warnings(dataset.report)


def say_uploaded(dataset: wire.Dataset) -> None:
    """What became of an upload: the classes and their counts, and every file that was left out."""
    say(f"{dataset.images} images in {len(dataset.labels)} classes")
    for split, labels in dataset.splits.items():
        say(f"  {split}: " + ", ".join(f"{label} {count}" for label, count in labels.items()))
    if dataset.skipped:
        say(f"{len(dataset.skipped)} files skipped:")
    for file in dataset.skipped:
        say(f"  {file.name}: {file.reason}")
    for name, value in _made_of(dataset.report).items():
        say(f"{name}: {value}")
    _say_warnings(dataset.report)


def _made_of(report: wire.DatasetReport | None) -> dict[str, object]:
    """Sizes as smallest / median / largest."""
    if report is None:
        return {}
    sides = {f"{name} (px)": _spread(f"{n:g}" for n in _three(spread)) for name, spread in _sides(report)}
    return {**sides, "file size": _spread(map(size, _three(report.bytes))), **_kinds(report), **_repeats(report)}


def _sides(report: wire.DatasetReport) -> tuple[tuple[str, wire.Spread], ...]:
    return ("width", report.width), ("height", report.height)


def _three(spread: wire.Spread) -> tuple[float, float, float]:
    return spread.min, spread.median, spread.max


def _spread(three: Iterable[str]) -> str:
    return " / ".join(three)


def _kinds(report: wire.DatasetReport) -> dict[str, object]:
    counts = {"modes": report.modes, "formats": report.formats}
    return {name: ", ".join(f"{kind} {n}" for kind, n in kinds.items()) for name, kinds in counts.items() if kinds}


def _repeats(report: wire.DatasetReport) -> dict[str, object]:
    found = report.duplicates
    counts = {f"repeated in {split}": count for split, count in found.repeated.items()}
    counts |= {"in several splits": found.leaked, "under several labels": found.contradictory}
    return {name: count for name, count in counts.items() if count}


def _say_warnings(report: wire.DatasetReport | None) -> None:
    """Each with its code, then the pictures that leak or contradict themselves, as far as the server lists them."""
    if report is None:
        return
    for warning in report.warnings:
        say(f"warning: {warning.text} ({warning.code})")
    found = report.duplicates
    for what, listed in (("in several splits", found.leaks), ("under several labels", found.contradictions)):
        for copies in listed[:COPIES_SHOWN]:
            say(f"  {what}: " + " | ".join(copies.names))


def show_feedback(page: wire.FeedbackPage) -> None:
    print_table(("label", "images"), page.labels.items(), f"no feedback yet: `lensrack feedback {page.task} IMAGE`")
    if page.items:
        say(f"the last {len(page.items)} of {page.images}:")
    for item in page.items:
        say(f"  {item.sha256}  {item.label}  {when(item.at)}")


def show_jobs(jobs: Sequence[wire.Job]) -> None:
    rows = [(job.id, job.task, job.method, job.state, _epochs(job.progress), when(job.created_at)) for job in jobs]
    print_table(("job", "task", "method", "state", "epoch", "made"), rows, "no jobs: `lensrack train` starts one")


def show_job(job: wire.Job) -> None:
    error = f"{job.error.code}: {job.error.detail}" if job.error else None
    times = {"made": when(job.created_at), "started": when(job.started_at), "finished": when(job.finished_at)}
    head = {"job": job.id, "task": job.task, "dataset": job.dataset, "method": job.method, "state": job.state}
    wish = {"publish": job.publish, "priority": job.priority}
    done = {"epoch": _epochs(job.progress), "version": job.version, "metrics": _metrics(job.metrics), "error": error}
    print_fields({**head, **wish, **done, **times})


def _epochs(progress: wire.JobProgress) -> str:
    return f"{progress.epoch}/{progress.epochs}" if progress.epochs else "-"


def _metrics(metrics: dict[str, Any]) -> str:
    shown = [(name, value) for name, value in metrics.items() if isinstance(value, int | float | str)]
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown)
