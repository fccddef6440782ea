"""Progress of uploads and jobs on stderr: a bar at a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from . import _archive, wire
from ._terminal import console, plain, say
from .client import JobHandle


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
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(f"{handle.job.task}: {handle.state}", total=None, status="")
        for event in handle.events():
            progress = _progress_of(event)
            if (trial := _trial_of(event)) is not None:
                bar.update(task, completed=trial[0], total=trial[1], status=plain(_trial_text(event)))
            elif progress is None:
                bar.update(task, description=f"{plain(handle.job.task)}: {plain(event.type)}")
            else:
                bar.update(task, completed=progress.epoch, total=progress.epochs, status=_progress_text(progress))


def _watch_lines(handle: JobHandle) -> None:
    for event in handle.events():
        progress = _progress_of(event)
        if _trial_of(event) is not None:
            say(f"{handle.job.task}: {_trial_text(event)}")
        else:
            say(f"{handle.job.task}: {event.type if progress is None else _progress_text(progress)}")


def _progress_of(event: wire.JobEvent) -> wire.JobProgress | None:
    if event.type != "epoch":
        return None
    try:
        return wire.JobProgress.model_validate(event.data)
    except ValidationError:
        return None  # from a newer server with other fields: shown by its type


def _trial_of(event: wire.JobEvent) -> tuple[int, int] | None:
    """Return the number of the trial that has ended, and of how many the search consists; None for other events."""
    numbers = event.data.get("trial"), event.data.get("trials")
    if event.type != "trial" or not all(isinstance(number, int) for number in numbers):
        return None
    return numbers  # type: ignore[return-value]


def _trial_text(event: wire.JobEvent) -> str:
    trial = event.data
    text = f"trial {trial['trial']}/{trial['trials']}  {trial.get('method')}  lr {trial.get('lr')}"
    if "kept" in trial:
        text += f"  {trial['kept']} prompts"
    accuracy = trial.get("val_accuracy")
    outcome = f"validation accuracy {accuracy:.1%}" if isinstance(accuracy, float) else "diverged"
    return f"{text}  {outcome}"


def _progress_text(progress: wire.JobProgress) -> str:
    parts = [f"epoch {progress.epoch}/{progress.epochs}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.val_accuracy is not None:
        parts.append(f"validation accuracy {progress.val_accuracy:.1%}")
    if progress.eta_s is not None:
        parts.append(f"{_clock(progress.eta_s)} left")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
