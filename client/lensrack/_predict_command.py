"""`lensrack predict`: answers for a few images at the terminal, or for any number in a CSV that can be resumed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import Client, LensrackError
from . import _terminal as term
from ._answers_file import AnswersFile
from ._folders import LeftOut, pictures_in
from ._hints import note_nearest_task
from ._images import ImageInput
from .answers import Answer
from .errors import ApiError, InvalidInput, concerns_image

STDIN = Path("-")
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
        sources = map(source_of, images)
        return client.map(self.task, sources, top_k=self.top_k, in_flight=self.in_flight, errors="return")


def source_of(path: Path) -> ImageInput:
    """Return a picture's path, or standard input for `-`."""
    return sys.stdin.buffer if path == STDIN else path


def found(paths: list[Path], left_out: LeftOut) -> list[Path]:
    """Return the pictures of the command's arguments. Raises InvalidInput if there are none, or a path is missing."""
    if missing := [path for path in paths if path != STDIN and not path.exists()]:
        raise InvalidInput(f"{missing[0]} does not exist")
    images = list(pictures_in(paths, left_out))
    if not images:
        reason = f"; left out: {left_out}" if str(left_out) else ""
        raise InvalidInput(f"{', '.join(map(str, paths))}: expected images, got none{reason}")
    return images


def to_terminal(call: PredictionCall, paths: list[Path]) -> None:
    left_out = LeftOut()
    images = found(paths, left_out)
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
    _print_failures(call.client, results)
    if str(left_out):
        term.say(f"left out: {left_out}")
    failed = [answer for _, answer in results if isinstance(answer, LensrackError)]
    if failed:
        raise typer.Exit(max(map(term.exit_code, failed)) if len(failed) == len(results) else 1)


def to_csv(call: PredictionCall, paths: list[Path], csv: Path, *, resume: bool, force: bool) -> None:
    """Write a row for each image, in order, as the answers come; the rows stay if the run is interrupted."""
    left_out = LeftOut()
    images = list(dict.fromkeys(found(paths, left_out)))
    with AnswersFile(csv, call.task, call.top_k, resume=resume, force=force) as file:
        remaining = [image for image in images if str(image) not in file.done]
        try:
            failures = _fill(call, file, remaining, len(images))
        except (KeyboardInterrupt, LensrackError):
            term.say(f"the answers so far are in {csv}: run the same command with --resume to continue")
            raise
    _print_failures(call.client, failures)
    summary = {"csv": str(csv), "images": len(images), "asked": len(remaining), "failed": len(failures)}
    if call.as_json:
        term.print_json({**summary, "left_out": left_out.counts()})
    else:
        term.say(
            f"{csv}: {len(images) - len(failures)} of {len(images)} images answered, {len(remaining)} sent in this run"
            + (f"; left out: {left_out}" if str(left_out) else "")
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
                if not concerns_image(answer):
                    raise answer
                failures.append((image, answer))
            file.write(image, answer)
            bar.advance(progress)
    return failures


def _print_failures(client: Client, results: Failures) -> None:
    """Print each different error once, such as that of an unreachable server, with the images that share it."""
    sharing: dict[str, list[tuple[Path, LensrackError]]] = {}
    for image, error in results:
        if isinstance(error, LensrackError):
            sharing.setdefault(_without_path(error, image), []).append((image, error))
    for failures in list(sharing.values())[:MAX_FAILURES_SHOWN]:
        (image, error), more = failures[0], len(failures) - 1
        note_nearest_task(error, client)
        about = f"{image} and {more} more" if more else str(image)
        term.print_error(error, about=about if len(results) > 1 else "")
    if len(sharing) > MAX_FAILURES_SHOWN:
        term.say(f"… and {len(sharing) - MAX_FAILURES_SHOWN} other errors: --csv FILE or --json lists all")


def _without_path(error: LensrackError, image: Path) -> str:
    """Return what images can share of an error: its text without the image's own path."""
    return str(error).replace(str(image), "")


def _as_dict(image: Path, answer: Answer | LensrackError) -> dict[str, Any]:
    if isinstance(answer, Answer):
        result = {"image": str(image), **answer.to_dict()}
        return result if len(answer.versions) > 1 else {key: result[key] for key in result if key != "versions"}
    code = answer.code if isinstance(answer, ApiError) else type(answer).__name__
    return {"image": str(image), "error": {"code": code, "detail": str(answer)}}
