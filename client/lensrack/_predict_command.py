"""`lensrack predict`: a few images to the terminal, or any number into a CSV that can be gone on with."""

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

OF_THE_IMAGE = frozenset({400, 413, 415, 422})  # statuses that say something of one image; others end the run
PATIENT_RETRIES = 6  # a long run bears a server that restarts
SAY_AT_MOST = 10

Failures = list[tuple[Path, Answer | LensrackError]]


@dataclass(frozen=True)
class PredictionCall:
    """What is asked about each image."""

    client: Client
    task: str
    top_k: int
    in_flight: int
    as_json: bool

    def answers(self, client: Client, images: Iterable[Path]) -> Iterator[Answer | LensrackError]:
        return client.map(self.task, images, top_k=self.top_k, in_flight=self.in_flight, errors="return")


def to_terminal(question: PredictionCall, paths: list[Path]) -> None:
    images = list(images_in(paths))
    if not images:
        raise InvalidInput(f"{', '.join(map(str, paths))}: expected images, found none")
    told = list(zip(images, question.answers(question.client, images), strict=True))
    if question.as_json:
        term.print_json([_as_dict(image, answer) for image, answer in told])
    elif not all(isinstance(answer, LensrackError) for _, answer in told):
        rows = [
            (image if best is answer.best else "", best.label, f"{best.score:.4f}")
            for image, answer in told
            if isinstance(answer, Answer)
            for best in answer
        ]
        term.print_table(("image", "label", "score"), rows, "no answers")
    _say_failures(told)
    failed = [answer for _, answer in told if isinstance(answer, LensrackError)]
    if failed:
        raise typer.Exit(max(map(term.exit_code, failed)) if len(failed) == len(told) else 1)


def to_csv(question: PredictionCall, paths: list[Path], csv: Path, *, resume: bool, force: bool) -> None:
    """Every image a row, in order, as the answers come. What ends the run leaves the rows there are."""
    images = list(dict.fromkeys(images_in(paths)))
    with AnswersFile(csv, question.task, question.top_k, resume=resume, force=force) as file:
        left = [image for image in images if str(image) not in file.done]
        try:
            failures = _fill(question, file, left, len(images))
        except (KeyboardInterrupt, LensrackError):
            term.say(f"what was answered is in {csv}: the same command with --resume goes on")
            raise
    _say_failures(failures)
    done = {"csv": str(csv), "images": len(images), "asked": len(left), "failed": len(failures)}
    if question.as_json:
        term.print_json(done)
    else:
        term.say(f"{csv}: {len(images) - len(failures)} of {len(images)} images answered, {len(left)} asked now")
    if failures:
        raise typer.Exit(1)


def _fill(question: PredictionCall, file: AnswersFile, left: list[Path], total: int) -> Failures:
    """The images that got no answer. Raises what concerns all of them, such as a server that is away."""
    failures: Failures = []
    client = question.client.with_options(max_retries=PATIENT_RETRIES)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=term.console(stderr=True)) as bar:
        asking = bar.add_task(term.plain(question.task), total=total, completed=total - len(left))
        answers = question.answers(client, left)
        for image, told in zip(left, answers, strict=True):
            if isinstance(told, LensrackError):
                if not _of_the_image(told):
                    raise told
                failures.append((image, told))
            file.write(image, told)
            bar.advance(asking)
    return failures


def _of_the_image(error: LensrackError) -> bool:
    return isinstance(error, InvalidInput) or (isinstance(error, ApiError) and error.status in OF_THE_IMAGE)


def _say_failures(told: Failures) -> None:
    """Each image's own; a failure that all share, such as a server that is away, once."""
    seen: set[str] = set()
    for image, error in told:
        if isinstance(error, LensrackError) and str(error) not in seen and len(seen) < SAY_AT_MOST:
            seen.add(str(error))
            term.print_error(error, about=str(image) if len(told) > 1 else "")


def _as_dict(image: Path, answer: Answer | LensrackError) -> dict[str, Any]:
    if isinstance(answer, Answer):
        best = [prediction.model_dump() for prediction in answer]
        told = {"image": str(image), "task": answer.task, "version": answer.version, "predictions": best}
        return {**told, "versions": list(answer.versions)} if len(answer.versions) > 1 else told
    code = answer.code if isinstance(answer, ApiError) else type(answer).__name__
    return {"image": str(image), "error": {"code": code, "detail": str(answer)}}
