"""Asking tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensrack import _asking, _completion
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
            help="A task, optionally @alias, @version or @several+together.",
            autocompletion=_completion.tasks,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", exists=True, help="Images, or folders of them.")],
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Labels for each image, best first.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="A file to write, a row an image, as the answers come.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a CSV that broke off.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a CSV that is there.")] = False,
    in_flight: Annotated[int, typer.Option(min=1, max=100, help="Images that are asked about at once.")] = 8,
    client_resize: Annotated[
        bool, typer.Option("--client-resize", help="Cut images to the model's size before they are sent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a task about images, or about all that are in folders.

    Exit code 1 where one of them got no answer. With --csv a run that broke off is gone on with by --resume: images
    that have their row are not asked about again, those that got no answer are.
    """
    client = client_of(context).with_options(client_resize=client_resize)
    question = _asking.PredictionCall(client, task, top_k, in_flight, wants_json(context, as_json))
    if csv is not None:
        _asking.to_csv(question, images, csv, resume=resume, force=force)
    elif resume or force:
        raise InvalidInput("--resume and --force are for a file: expected --csv FILE")
    else:
        _asking.to_terminal(question, images)
