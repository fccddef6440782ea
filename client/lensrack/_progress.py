"""Progress at the terminal, always on stderr: a bar where somebody looks, plain lines where nobody does."""

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
    """A bar for the bytes of an upload; a retry starts it again."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True)) as bar:
        task = bar.add_task(f"packing {plain(name)}", total=None)

        def progress(sent: int, total: int | None) -> None:
            doing = "storing" if sent == total else "sending"  # the server looks at every image before it answers
            bar.update(task, completed=sent, total=total, description=f"{doing} {plain(name)}")

        yield progress


def watch(handle: JobHandle) -> wire.Job:
    """Follow a job to its end. Raises JobFailed."""
    if handle.job.finished:
        return handle.wait()
    if console(stderr=True).is_terminal:
        _watch_bar(handle)
    else:
        _watch_lines(handle)
    return handle.wait()


def _watch_bar(handle: JobHandle) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(f"{handle.job.task}: {handle.state}", total=None, told="")
        for event in handle.events():
            told = _progress_of(event)
            if (trial := _trial_of(event)) is not None:
                bar.update(task, completed=trial[0], total=trial[1], told=plain(_tried(event)))
            elif told is None:
                bar.update(task, description=f"{plain(handle.job.task)}: {plain(event.type)}")
            else:
                bar.update(task, completed=told.epoch, total=told.epochs, told=_told(told))


def _watch_lines(handle: JobHandle) -> None:
    for event in handle.events():
        told = _progress_of(event)
        if _trial_of(event) is not None:
            say(f"{handle.job.task}: {_tried(event)}")
        else:
            say(f"{handle.job.task}: {event.type if told is None else _told(told)}")


def _progress_of(event: wire.JobEvent) -> wire.JobProgress | None:
    if event.type != "epoch":
        return None
    try:
        return wire.JobProgress.model_validate(event.data)
    except ValidationError:
        return None  # an epoch that a newer server describes otherwise is still an event worth a line


def _trial_of(event: wire.JobEvent) -> tuple[int, int] | None:
    """The number of a search's trial that has ended, and of how many."""
    numbers = event.data.get("trial"), event.data.get("trials")
    if event.type != "trial" or not all(isinstance(number, int) for number in numbers):
        return None
    return numbers  # type: ignore[return-value]


def _tried(event: wire.JobEvent) -> str:
    tried = event.data
    what = f"trial {tried['trial']}/{tried['trials']}  {tried.get('method')}  lr {tried.get('lr')}"
    if "kept" in tried:
        what += f"  {tried['kept']} prompts"
    accuracy = tried.get("val_accuracy")
    outcome = f"validation accuracy {accuracy:.1%}" if isinstance(accuracy, float) else "diverged"
    return f"{what}  {outcome}"


def _told(progress: wire.JobProgress) -> str:
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
