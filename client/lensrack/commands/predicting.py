"""The command for predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensrack import _completion, _predict_command
from lensrack.errors import InvalidInput

from .session import Context, Json, client_of, wants_json

commands = typer.Typer()


@commands.command()
def predict(
    context: Context,
    *,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="A task, optionally with @alias, @version or @one+another (an ensemble).",
            autocompletion=_completion.tasks,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", exists=True, help="Images, or folders of them.")],
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Labels for each image, best first.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="A file to write, with a row for each image.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the CSV of an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing CSV.")] = False,
    in_flight: Annotated[int, typer.Option(min=1, max=100, help="Requests that are open at once.")] = 8,
    client_resize: Annotated[
        bool, typer.Option("--client-resize", help="Resize images to the model's size before they are sent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Classify images, or all images in folders, by a task.

    Exit code 1 if an image got no answer. With --csv, --resume continues an interrupted run: images with an answer are
    not sent again, images that failed are.
    """
    client = client_of(context).with_options(client_resize=client_resize)
    call = _predict_command.PredictionCall(client, task, top_k, in_flight, wants_json(context, as_json))
    if csv is not None:
        _predict_command.to_csv(call, images, csv, resume=resume, force=force)
    elif resume or force:
        raise InvalidInput("--resume and --force are for a file: expected --csv FILE")
    else:
        _predict_command.to_terminal(call, images)
