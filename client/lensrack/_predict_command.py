"""`lensrack predict`: answers for a few images at the terminal, or for any number in a CSV that can be resumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import Client, LensrackError
from . import _terminal as term
from ._answers_file import AnswersFile, images_in
from .answers import Answer
from .errors import ApiError, InvalidInput

IMAGE_STATUSES = frozenset({400, 413, 415, 422})  # statuses that concern one image; others end the run
PATIENT_RETRIES = 6  # so that a long run survives a restart of the server
MAX_FAILURES_SHOWN = 10

Failures = list[tuple[Path, Answer | LensrackError]]


@dataclass(frozen=True)
class PredictionCall:
    """The client, task and options of a run."""

    client: Client
    task: str
    top_k: int
    in_flight: int
    as_json: bool

    def answers(self, client: Client, images: Iterable[Path]) -> Iterator[Answer | LensrackError]:
        return client.map(self.task, images, top_k=self.top_k, in_flight=self.in_flight, errors="return")


def to_terminal(call: PredictionCall, paths: list[Path]) -> None:
    images = list(images_in(paths))
    if not images:
        raise InvalidInput(f"{', '.join(map(str, paths))}: expected images, got none")
    results = list(zip(images, call.answers(call.client, images), strict=True))
    if call.as_json:
        term.print_json([_as_dict(image, answer) for image, answer in results])
    elif not all(isinstance(answer, LensrackError) for _, answer in results):
        rows = [
            (image if best is answer.best else "", best.label, f"{best.score:.4f}")
            for image, answer in results
            if isinstance(answer, Answer)
            for best in answer
        ]
        term.print_table(("image", "label", "score"), rows, "no answers")
    _print_failures(results)
    failed = [answer for _, answer in results if isinstance(answer, LensrackError)]
    if failed:
        raise typer.Exit(max(map(term.exit_code, failed)) if len(failed) == len(results) else 1)


def to_csv(call: PredictionCall, paths: list[Path], csv: Path, *, resume: bool, force: bool) -> None:
    """Write a row for each image, in order, as the answers come; the rows stay if the run is interrupted."""
    images = list(dict.fromkeys(images_in(paths)))
    with AnswersFile(csv, call.task, call.top_k, resume=resume, force=force) as file:
        remaining = [image for image in images if str(image) not in file.done]
        try:
            failures = _fill(call, file, remaining, len(images))
        except (KeyboardInterrupt, LensrackError):
            term.say(f"the answers so far are in {csv}: run the same command with --resume to continue")
            raise
    _print_failures(failures)
    summary = {"csv": str(csv), "images": len(images), "asked": len(remaining), "failed": len(failures)}
    if call.as_json:
        term.print_json(summary)
    else:
        term.say(
            f"{csv}: {len(images) - len(failures)} of {len(images)} images answered, {len(remaining)} sent in this run"
        )
    if failures:
        raise typer.Exit(1)


def _fill(call: PredictionCall, file: AnswersFile, remaining: list[Path], total: int) -> Failures:
    """Return the images that failed. Raises errors that concern all images, such as an unreachable server."""
    failures: Failures = []
    client = call.client.with_options(max_retries=PATIENT_RETRIES)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=term.console(stderr=True)) as bar:
        progress = bar.add_task(term.plain(call.task), total=total, completed=total - len(remaining))
        answers = call.answers(client, remaining)
        for image, answer in zip(remaining, answers, strict=True):
            if isinstance(answer, LensrackError):
                if not _concerns_image(answer):
                    raise answer
                failures.append((image, answer))
            file.write(image, answer)
            bar.advance(progress)
    return failures


def _concerns_image(error: LensrackError) -> bool:
    return isinstance(error, InvalidInput) or (isinstance(error, ApiError) and error.status in IMAGE_STATUSES)


def _print_failures(results: Failures) -> None:
    """Print each different error once, such as that of an unreachable server, which all images share."""
    seen: set[str] = set()
    for image, error in results:
        if isinstance(error, LensrackError) and str(error) not in seen and len(seen) < MAX_FAILURES_SHOWN:
            seen.add(str(error))
            term.print_error(error, about=str(image) if len(results) > 1 else "")


def _as_dict(image: Path, answer: Answer | LensrackError) -> dict[str, Any]:
    if isinstance(answer, Answer):
        best = [prediction.model_dump() for prediction in answer]
        result = {"image": str(image), "task": answer.task, "version": answer.version, "predictions": best}
        return {**result, "versions": list(answer.versions)} if len(answer.versions) > 1 else result
    code = answer.code if isinstance(answer, ApiError) else type(answer).__name__
    return {"image": str(image), "error": {"code": code, "detail": str(answer)}}
