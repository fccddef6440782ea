"""Jobs in words, for the command line: an event, the progress, a search's trials, and what a job has ended with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from . import wire

_PHASES = {
    "reading": "reading the images",
    "features": "caching features",
    "head": "fitting a preliminary head",
    "publish": "evaluating and publishing",
}


def event_text(job: wire.Job, event: wire.JobEvent) -> str:
    """Return one line about an event."""
    if event.type == "trial":
        return trial_text(event.data)
    if event.type in ("epoch", "progress") and (progress := progress_of(event)) is not None:
        return progress_text(progress)
    if event.type in ("published", "kept") and "version" in event.data:
        return _published_text(job, event)
    return event.type


def progress_of(event: wire.JobEvent) -> wire.JobProgress | None:
    try:
        return wire.JobProgress.model_validate(event.data)
    except ValidationError:
        return None  # from a newer server with other fields: shown by its type


def progress_text(progress: wire.JobProgress) -> str:
    parts = []
    if progress.trials and progress.trial:
        parts.append(f"{'fit' if progress.phase == 'compare' else 'trial'} {progress.trial}/{progress.trials}")
    if progress.phase in _PHASES:
        parts.append(_PHASES[progress.phase])
    elif progress.epochs:
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.val_nll is not None:
        parts.append(f"validation loss {progress.val_nll:.4f}")
    if progress.val_accuracy is not None:
        parts.append(f"validation accuracy {progress.val_accuracy:.1%}")
    if progress.share is not None:
        parts.append(f"{progress.share:.0%} done")
    if progress.eta_s is not None:
        parts.append(f"{clock(progress.eta_s)} left")
    return "  ".join(parts) or "running"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _published_text(job: wire.Job, event: wire.JobEvent) -> str:
    data, version = event.data, str(event.data["version"])[:12]
    if event.type == "published":
        text = f"version {version} is live"
        if data.get("preliminary"):
            text = f"a preliminary version answers while training goes on: `lensrack predict {job.task} IMAGE`"
    else:
        text = f"{'preliminary ' if data.get('preliminary') else ''}version {version} is stored and not live"
    return "  ".join([text, *([judged] if (judged := judged_text(data)) else [accuracy_text(data)])]).rstrip()


def judged_text(judged: Mapping[str, Any]) -> str:
    """Return the figures by which the publishing policy if_better decided; empty where it compared nothing."""
    new, live = judged.get("new"), judged.get("live")
    if not new or not live:
        return ""
    images = f"the same {new['images']}" if new.get("images") else "the same"
    text = f"validation accuracy {new['accuracy']:.1%} against {live['accuracy']:.1%} of the version that was live"
    if new["accuracy"] == live["accuracy"]:
        text += f", validation loss {new['nll']:.4f} against {live['nll']:.4f}"
    return f"{text}, on {images} images"


def accuracy_text(figures: Mapping[str, Any], split: str = "val") -> str:
    """Return an accuracy with its interval; empty where it was not measured. `figures` have it as `val_accuracy` and
    `val_interval`, or in a mapping `val`."""
    found = figures.get(split) or {name: figures.get(f"{split}_{name}") for name in ("accuracy", "interval", "images")}
    if not isinstance(found, Mapping) or not isinstance(found.get("accuracy"), int | float):
        return ""
    text = f"{'validation' if split == 'val' else split} accuracy {found['accuracy']:.1%}"
    if found.get("interval") and found.get("images"):
        low, high = found["interval"]
        text += f" (95% interval {100 * low:.0f}-{high:.0%}, {found['images']} images)"
    return text


# --- a search's trials ------------------------------------------------------------------------------------------------


def trial_text(trial: Mapping[str, Any]) -> str:
    parts = [f"trial {trial.get('trial')}/{trial.get('trials')}", str(trial.get("method"))]
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in _settings(trial).items()]
    if "kept" in trial:
        parts.append(f"{trial['kept']} prompts")
    if trial.get("val_accuracy") is None:
        return "  ".join([*parts, "diverged"])
    if trial.get("val_nll") is not None:
        parts.append(f"validation loss {trial['val_nll']:.4f}")
    return "  ".join([*parts, accuracy_text(trial)])


def trial_table(trials: Sequence[Mapping[str, Any]], chosen: int | None) -> tuple[list[str], list[list[object]]]:
    """Return the head and the rows of a table of a search's trials; the settings are those in which they differ."""
    names = list(dict.fromkeys(name for trial in trials for name in _settings(trial)))
    names = [name for name in names if len({str(trial.get(name)) for trial in trials}) > 1]
    head = ["trial", "rung", "method", *(name.replace("_", " ") for name in names)]
    rows = []
    for number, trial in enumerate(trials, start=1):
        nll, interval = trial.get("val_nll"), trial.get("val_interval")
        accuracy = "diverged" if trial.get("val_accuracy") is None else f"{trial['val_accuracy']:.1%}"
        cells = [number, trial.get("rung"), trial.get("method"), *(trial.get(name) for name in names)]
        cells += [None if nll is None else f"{nll:.4f}", accuracy]
        cells += [f"{100 * interval[0]:.0f}-{interval[1]:.0%}" if interval else None]
        rows.append([*cells, "fitted in full" if number == chosen else ""])
    return [*head, "validation loss", "accuracy", "95% interval", ""], rows


def ranking_text(trials: Iterable[Mapping[str, Any]]) -> str:
    """Return how trials are ranked, and how uncertain their accuracies are."""
    text = "the search goes by the validation loss, among trials of one rung"
    images = max((trial.get("val_images") or 0 for trial in trials), default=0)
    if images:
        points = 98 / math.sqrt(images + 3.84)  # half of the widest interval, that of 50 %
        text += f"; on {images} validation images an accuracy is uncertain by up to ± {points:.0f} points"
    return text


def _settings(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's fields of a trial that tell it from others."""
    hidden = {"epochs"} if trial.get("prompts") else {"epochs", "prompts"}
    return {name: trial[name] for name in wire.Recipe.model_fields if name in trial and name not in hidden}


# --- the end ----------------------------------------------------------------------------------------------------------


def outcome_text(job: wire.Job) -> str:
    """Return what a job with a version has achieved and what to do next."""
    version = str(job.version)[:12]
    accuracy = accuracy_text(job.metrics, "test") or accuracy_text(job.metrics)
    text = f"{job.task}: {accuracy or f'version {version} is trained'}"
    if job.metrics.get("published") is False:
        return f"{text}; ask it: `lensrack predict {job.task}@{version} IMAGE`"
    return f"{text}; ask it: `lensrack predict {job.task} IMAGE`"
