"""The commands for predictions and their evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensrack import _completion, _evaluate_command, _predict_command
from lensrack import _terminal as term
from lensrack.errors import InvalidInput

from .session import Context, Images, Json, client_of, wants_json

commands = typer.Typer()

TaskRef = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A task, optionally with @alias, @version or @one+another (an ensemble).",
        autocompletion=_completion.tasks,
    ),
]
InFlight = Annotated[int, typer.Option(min=1, max=100, help="Requests that are open at once.")]
ClientResize = Annotated[
    bool, typer.Option("--client-resize", help="Resize images to the model's size before they are sent.")
]


@commands.command()
def predict(
    context: Context,
    *,
    task: TaskRef,
    images: Images,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Labels for each image, best first.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="A file to write, with a row for each image.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the CSV of an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing CSV.")] = False,
    in_flight: InFlight = 8,
    client_resize: ClientResize = False,
    as_json: Json = False,
) -> None:
    """Classify images, or all images in folders, by a task.

    Exit code 1 if an image got no answer. With --csv, --resume continues an interrupted run: images with an answer are
    not sent again, images that failed are. Links are followed; the last line counts the files that were left out.
    """
    client = client_of(context).with_options(client_resize=client_resize)
    call = _predict_command.PredictionCall(client, task, top_k, in_flight, wants_json(context, as_json))
    if csv is not None:
        _predict_command.to_csv(call, images, csv, resume=resume, force=force)
    elif resume or force:
        raise InvalidInput("--resume and --force are for a file: expected --csv FILE")
    else:
        _predict_command.to_terminal(call, images)


@commands.command()
def evaluate(
    context: Context,
    *,
    task: TaskRef,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="A folder of class folders.")
    ],
    csv: Annotated[Path | None, typer.Option(help="A file to write, with the images answered wrongly.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing CSV.")] = False,
    in_flight: InFlight = 8,
    client_resize: ClientResize = False,
    as_json: Json = False,
) -> None:
    """Compare a task's answers with the names of the images' folders.

    Prints the accuracy with its interval, the figures by class and the confusion matrix. The names must be the task's
    labels exactly. Exit code 1 if an image got no answer; such images count in no figure.
    """
    if csv is not None and csv.exists() and not force:
        raise InvalidInput(f"{csv} exists: --force replaces it")
    client = client_of(context).with_options(client_resize=client_resize, max_retries=_predict_command.PATIENT_RETRIES)
    with _evaluate_command.picture_bar(task) as progress:
        scores = client.evaluate(task, folder, in_flight=in_flight, progress=progress)
    if csv is not None:
        _evaluate_command.write_csv(scores, csv)
    term.print_json(scores.to_dict()) if wants_json(context, as_json) else _evaluate_command.show(scores)
    if scores.unreadable:
        raise typer.Exit(1)
