"""What the command line prints: results to stdout, messages and errors to stderr.

Control characters in text from the server are replaced, so that no label can send commands to the terminal.
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

COPIES_SHOWN = 5  # of the pictures that a warning is about; --json prints all that the server lists
PIPED_WIDTH = 400  # columns are not truncated in a pipe

_NEXT = {
    "task_not_found": "`lensrack tasks list` shows all tasks",
    "version_not_found": "`lensrack versions TASK` shows the task's versions",
    "alias_not_found": "`lensrack tasks show TASK` shows the task's aliases",
    "dataset_not_found": "`lensrack datasets list` shows all datasets",
    "job_not_found": "`lensrack jobs list` shows all jobs",
    "version_in_use": "point its aliases elsewhere first: `lensrack alias TASK ALIAS VERSION`",
    "wrong_backbone": "use a server that runs the bundle's backbone, or train the task on this one",
    "unknown_label": "check the label, or add --new-label",
    "nothing_new": "correct more images; a new class needs at least two",
    "no_feedback": "`lensrack feedback TASK IMAGE --label LABEL` stores an image's correct label",
    "no_parent_dataset": "choose one of `lensrack datasets list` with --parent",
    "upload_not_found": "start again without --resume",
    "job_finished": "the job has already ended",
    "unsupported_media_type": "send JPEG, PNG, WebP or BMP images; zip, tar, tar.gz, tar.zst, parquet or npz datasets",
    "unsupported_image": "send JPEG, PNG, WebP or BMP",
    "bad_image": "check that the file opens in an image viewer",
    "not_ready": "`lensrack health` shows what the server is waiting for",
}


def plain(text: object) -> str:
    """Return a text with replacement characters for unprintable ones; joiners are parts of words and emoji."""
    return "".join(
        char if char.isprintable() or char in "\u200c\u200d" else "\N{REPLACEMENT CHARACTER}" for char in str(text)
    )


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a message to stderr."""
    print(plain(text), file=sys.stderr)


def print_json(value: BaseModel | Sequence[BaseModel] | dict[str, Any] | list[dict[str, Any]]) -> None:
    print(json.dumps(_dumped(value), ensure_ascii=False, indent=2))


def _dumped(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return [_dumped(item) for item in value] if isinstance(value, list | tuple) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Print rows under a heading, or the message `empty` to stderr if there are none."""
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
    """Print a table without trailing blanks."""
    stdout = console()
    with stdout.capture() as capture:
        stdout.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def exit_code(error: LensrackError | OSError) -> int:
    """Return 1 for a failure, 2 for an invalid command, which sent nothing, 3 for an error that may pass later."""
    if isinstance(error, InvalidInput):
        return 2
    temporary = (ConnectError, RequestTimeout, RateLimitedError, UnavailableError, DeadlineError)
    return 3 if isinstance(error, temporary) else 1


def print_error(error: LensrackError | OSError, about: str = "") -> None:
    """Print one line: what failed, for what, and what to do next."""
    advice = "; ".join(filter(None, [*getattr(error, "__notes__", ()), _advice(error)]))
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
        return f"see the server's log for request id {error.request_id or 'unknown'}"
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
    print_table(("task", "live", "versions", "resident"), rows, "no tasks yet: `lensrack train` creates one")


def show_task(task: wire.Task) -> None:
    aliases = {f"alias {alias.name}": f"{targets(alias)} (etag {alias.etag})" for alias in task.aliases}
    print_fields({"task": task.task, "versions": task.versions, "resident": task.resident, **aliases})


def show_versions(versions: Sequence[wire.VersionInfo], aliases: Sequence[wire.Alias]) -> None:
    """Print the versions, newest first, with the aliases that point at each."""
    rows = [
        (
            version.version[:12],
            _aliases_of(version, aliases),
            when(version.created_at),
            version.method,
            _accuracy(version.metrics),
            len(version.labels),
            version.dataset and version.dataset[:12],
            size(version.bytes),
        )
        for version in sorted(versions, key=lambda version: version.created_at, reverse=True)
    ]
    columns = ("version", "alias", "made", "method", "validation accuracy", "labels", "dataset", "size")
    print_table(columns, rows, "no versions")


def _aliases_of(version: wire.VersionInfo, aliases: Sequence[wire.Alias]) -> str | None:
    """Return the aliases of a version, with its share where one splits its requests."""
    shares = [
        alias.name + (f" {target.weight:.0%}" if len(alias.targets) > 1 else "")
        for alias in aliases
        for target in alias.targets
        if target.version == version.version
    ]
    return ", ".join(shares) or None


def _accuracy(metrics: dict[str, Any]) -> str | None:
    accuracy = metrics.get("val_accuracy")
    return f"{accuracy:.1%}" if isinstance(accuracy, int | float) else None


def show_alias(task: str, alias: wire.Alias) -> None:
    print_fields({"task": task, "alias": alias.name, "version": targets(alias), "etag": alias.etag})


def show_datasets(datasets: Sequence[wire.Dataset]) -> None:
    rows = [(d.id, d.name, len(d.labels), d.images, size(d.bytes), when(d.created_at)) for d in datasets]
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
    print_fields({**head, **counts, **_report_fields(dataset.report), "skipped": len(dataset.skipped)})
    _say_warnings(dataset.report)


def say_uploaded(dataset: wire.Dataset) -> None:
    """Print a stored dataset: its classes and their counts, and every skipped file."""
    say(f"{dataset.images} images in {len(dataset.labels)} classes")
    for split, labels in dataset.splits.items():
        say(f"  {split}: " + ", ".join(f"{label} {count}" for label, count in labels.items()))
    if dataset.skipped:
        say(f"{len(dataset.skipped)} files skipped:")
    for file in dataset.skipped:
        say(f"  {file.name}: {file.reason}")
    for name, value in _report_fields(dataset.report).items():
        say(f"{name}: {value}")
    _say_warnings(dataset.report)


def _report_fields(report: wire.DatasetReport | None) -> dict[str, object]:
    """Return the fields of a report; sizes as smallest / median / largest."""
    if report is None:
        return {}
    sides = {f"{name} (px)": _range_text(f"{n:g}" for n in _min_median_max(spread)) for name, spread in _sides(report)}
    return {
        **sides,
        "file size": _range_text(map(size, _min_median_max(report.bytes))),
        **_mode_counts(report),
        **_duplicate_counts(report),
    }


def _sides(report: wire.DatasetReport) -> tuple[tuple[str, wire.Spread], ...]:
    return ("width", report.width), ("height", report.height)


def _min_median_max(spread: wire.Spread) -> tuple[float, float, float]:
    return spread.min, spread.median, spread.max


def _range_text(values: Iterable[str]) -> str:
    return " / ".join(values)


def _mode_counts(report: wire.DatasetReport) -> dict[str, object]:
    counts = {"modes": report.modes, "formats": report.formats}
    return {name: ", ".join(f"{kind} {n}" for kind, n in kinds.items()) for name, kinds in counts.items() if kinds}


def _duplicate_counts(report: wire.DatasetReport) -> dict[str, object]:
    duplicates = report.duplicates
    counts = {f"repeated in {split}": count for split, count in duplicates.repeated.items()}
    counts |= {"in several splits": duplicates.leaked, "under several labels": duplicates.contradictory}
    return {name: count for name, count in counts.items() if count}


def _say_warnings(report: wire.DatasetReport | None) -> None:
    """Print each warning with its code, then the listed pictures in several splits or under several labels."""
    if report is None:
        return
    for warning in report.warnings:
        say(f"warning: {warning.text} ({warning.code})")
    duplicates = report.duplicates
    for problem, pictures in (
        ("in several splits", duplicates.leaks),
        ("under several labels", duplicates.contradictions),
    ):
        for copies in pictures[:COPIES_SHOWN]:
            say(f"  {problem}: " + " | ".join(copies.names))


def show_feedback(page: wire.FeedbackPage) -> None:
    print_table(("label", "images"), page.labels.items(), f"no feedback yet: `lensrack feedback {page.task} IMAGE`")
    if page.items:
        say(f"the newest {len(page.items)} of {page.images}:")
    for item in page.items:
        say(f"  {item.sha256}  {item.label}  {when(item.at)}")
    for warning in page.warnings:
        say(f"warning: {warning.text}")


def show_jobs(jobs: Sequence[wire.Job]) -> None:
    rows = [(job.id, job.task, job.method, job.state, _epochs(job.progress), when(job.created_at)) for job in jobs]
    print_table(("job", "task", "method", "state", "epoch", "made"), rows, "no jobs: `lensrack train` starts one")


def show_job(job: wire.Job) -> None:
    error = f"{job.error.code}: {job.error.detail}" if job.error else None
    times = {"made": when(job.created_at), "started": when(job.started_at), "finished": when(job.finished_at)}
    head = {"job": job.id, "task": job.task, "dataset": job.dataset, "method": job.method, "state": job.state}
    options = {"publish": job.publish, "priority": job.priority}
    outcome = {"epoch": _epochs(job.progress), "version": job.version, "metrics": _metrics(job.metrics), "error": error}
    print_fields({**head, **options, **outcome, **times})


def _epochs(progress: wire.JobProgress) -> str:
    return f"{progress.epoch}/{progress.epochs}" if progress.epochs else "-"


def _metrics(metrics: dict[str, Any]) -> str:
    plain_values = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in plain_values.items())
