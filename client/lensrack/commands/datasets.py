"""Commands for datasets, and for feedback, which becomes a dataset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import typer

from lensrack import _feedback_command, wire
from lensrack import _terminal as term
from lensrack._progress import upload_bar
from lensrack.errors import ConnectError, InvalidInput, RequestTimeout, ServerError

from .session import (
    Context,
    DatasetId,
    DatasetName,
    Json,
    Resume,
    SourcePath,
    TaskName,
    client_of,
    show_deleted,
    wants_json,
)

LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="The labels' column of a parquet file or a table.")
]

commands = typer.Typer()
datasets = typer.Typer(help="Labelled images to train on.")


@datasets.callback(invoke_without_command=True)
def datasets_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_datasets(context, as_json)


@datasets.command("upload")
def upload_dataset(
    context: Context,
    *,
    path: SourcePath,
    name: DatasetName = None,
    label_column: LabelColumn = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Store a folder of class folders; prints its id.

    Also a zip or tar (plain, gz, zst, bz2 or xz) of one, or of pictures and a labels.csv or metadata.jsonl; a parquet
    file with images and labels; an npz like MedMNIST's. Links are not followed, hidden files are left out. Large
    sources are sent in pieces, and continue by themselves when the connection breaks.
    """
    send = partial(client_of(context).datasets.upload, name=name, label_column=label_column)
    stored = _upload(path, resume, send)
    term.print_json(stored) if wants_json(context, as_json) else print(stored.id)


@datasets.command("add")
def add_to_dataset(
    context: Context,
    *,
    path: SourcePath,
    parent: Annotated[str, typer.Option(metavar="DATASET", help="The dataset to add to.")],
    name: DatasetName = None,
    label_column: LabelColumn = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Store a dataset's images and those of a folder or archive as a new dataset; prints its id."""
    send = partial(client_of(context).datasets.add, parent=parent, name=name, label_column=label_column)
    stored = _upload(path, resume, send)
    if stored.id.startswith(parent):
        term.say("nothing is new: the dataset has all of these images under these labels")
    term.print_json(stored) if wants_json(context, as_json) else print(stored.id)


def _upload(path: Path, resume: str | None, send: Callable[..., wire.Dataset]) -> wire.Dataset:
    """Upload a folder, an archive or stdin; if that is interrupted, print how to continue."""
    source: Path | BinaryIO = sys.stdin.buffer if str(path) == "-" else path
    uploads = [resume] if resume else []
    try:
        with upload_bar(path.resolve().name) as progress:
            stored = send(source, progress=progress, resume=resume, on_upload=uploads.append)
    except (KeyboardInterrupt, ConnectError, RequestTimeout, ServerError):
        if uploads:
            term.say(f"the server keeps what it received: run the same command with --resume {uploads[-1]} to continue")
        raise
    term.say_uploaded(stored)
    return stored


@datasets.command("from-feedback")
def freeze_feedback(
    context: Context,
    task: TaskName,
    name: DatasetName = None,
    parent: Annotated[str | None, typer.Option(metavar="DATASET", help="Default: the live version's dataset.")] = None,
    as_json: Json = False,
) -> None:
    """Store a task's dataset, corrected and extended by its feedback, as a new one; prints its id.

    Lists the feedback that was left out, with the reason; exit code 1 if nothing is new.
    """
    stored = client_of(context).tasks.freeze_feedback(task, name=name, parent=parent)
    term.say_uploaded(stored)
    term.print_json(stored) if wants_json(context, as_json) else print(stored.id)


@datasets.command("list")
def list_datasets(context: Context, as_json: Json = False) -> None:
    """List all datasets."""
    stored = client_of(context).datasets.list()
    term.print_json(stored) if wants_json(context, as_json) else term.show_datasets(stored)


@datasets.command("show")
def show_dataset(context: Context, dataset: DatasetId, as_json: Json = False) -> None:
    """Show one dataset with its counts."""
    stored = client_of(context).datasets.get(dataset)
    term.print_json(stored) if wants_json(context, as_json) else term.show_dataset(stored)


@datasets.command("delete")
def delete_dataset(context: Context, dataset: DatasetId, as_json: Json = False) -> None:
    """Delete a dataset."""
    client_of(context).datasets.delete(dataset)
    show_deleted(context, "dataset", dataset, as_json=as_json)


@commands.command()
def feedback(
    context: Context,
    *,
    task: TaskName,
    images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", show_default=False)] = None,
    label: Annotated[str | None, typer.Option(help="The images' correct label.")] = None,
    new_label: Annotated[bool, typer.Option("--new-label", help="Accept a label that the task does not have.")] = False,
    withdraw: Annotated[str | None, typer.Option(metavar="SHA256", help="Delete this image's feedback.")] = None,
    as_json: Json = False,
) -> None:
    """Store the correct label of images or of all images in folders, or show a task's feedback.

    Exit code 1 if an image was refused; the others are stored. - is an image from standard input.
    `lensrack datasets from-feedback TASK` makes a dataset of it.
    """
    if bool(images) != (label is not None):
        raise InvalidInput("give images and their --label, or neither to see the task's feedback")
    client, json = client_of(context), wants_json(context, as_json)
    if withdraw is not None:
        client.tasks.delete_feedback(task, withdraw)
        term.say(f"feedback {withdraw} withdrawn")
    withdrawn: list[dict[str, Any]] = [{"withdrawn": withdraw}] if withdraw is not None else []
    if images:
        send = partial(client.feedback, task, label=cast(str, label), new_label=new_label)
        _feedback_command.send(send, images, withdrawn, as_json=json)
    elif withdraw is None:
        page = client.tasks.feedback(task)
        term.print_json(page) if json else term.show_feedback(page)
    elif json:
        term.print_json(withdrawn)
