"""Data sets, and the feedback that grows into one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import typer

from lensrack import _terminal as term
from lensrack import wire
from lensrack._watch import upload_bar
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

commands = typer.Typer()
datasets = typer.Typer(help="Labelled images to train on.")


@datasets.callback(invoke_without_command=True)
def datasets_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_datasets(context, as_json)


@datasets.command("upload")
def upload_dataset(
    context: Context,
    path: SourcePath,
    name: DatasetName = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Store a folder of class folders; prints its id.

    Also a zip, tar, tar.gz or tar.zst of one, or of pictures and a labels.csv or metadata.jsonl; a parquet file with
    images and labels; an npz like MedMNIST's. Links are not followed, hidden files are left out. What is large is sent
    in pieces and goes on by itself when the connection breaks.
    """
    stored = _sent(path, resume, partial(client_of(context).datasets.upload, name=name))
    term.print_json(stored) if wants_json(context, as_json) else print(stored.id)


@datasets.command("add")
def add_to_dataset(
    context: Context,
    *,
    path: SourcePath,
    parent: Annotated[str, typer.Option(metavar="DATASET", help="The dataset to add to.")],
    name: DatasetName = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Store a dataset's images and those of a folder or archive as a new dataset; prints its id."""
    stored = _sent(path, resume, partial(client_of(context).datasets.add, parent=parent, name=name))
    term.print_json(stored) if wants_json(context, as_json) else print(stored.id)


def _sent(path: Path, resume: str | None, send: Callable[..., wire.Dataset]) -> wire.Dataset:
    """What a folder, an archive or stdin has become; a word about how to go on where it could not be sent whole."""
    source: Path | BinaryIO = sys.stdin.buffer if str(path) == "-" else path
    begun = [resume] if resume else []
    try:
        with upload_bar(path.resolve().name) as progress:
            stored = send(source, progress=progress, resume=resume, on_upload=begun.append)
    except (KeyboardInterrupt, ConnectError, RequestTimeout, ServerError):
        if begun:
            term.say(f"what has arrived is kept for a while: the same command with --resume {begun[-1]} goes on")
        raise
    term.say_uploaded(stored)
    return stored


@datasets.command("from-feedback")
def freeze_feedback(
    context: Context,
    task: TaskName,
    name: DatasetName = None,
    parent: Annotated[str | None, typer.Option(metavar="DATASET", help="Instead of the live version's.")] = None,
    as_json: Json = False,
) -> None:
    """Store what a task was fitted on, corrected and extended by its feedback; prints the dataset's id."""
    stored = client_of(context).tasks.freeze_feedback(task, name=name, parent=parent)
    term.say_uploaded(stored)
    term.print_json(stored) if wants_json(context, as_json) else print(stored.id)


@datasets.command("list")
def list_datasets(context: Context, as_json: Json = False) -> None:
    """All datasets."""
    found = client_of(context).datasets.list()
    term.print_json(found) if wants_json(context, as_json) else term.show_datasets(found)


@datasets.command("show")
def show_dataset(context: Context, dataset: DatasetId, as_json: Json = False) -> None:
    """One dataset and its counts."""
    found = client_of(context).datasets.get(dataset)
    term.print_json(found) if wants_json(context, as_json) else term.show_dataset(found)


@datasets.command("delete")
def delete_dataset(context: Context, dataset: DatasetId, as_json: Json = False) -> None:
    """Forget a dataset."""
    client_of(context).datasets.delete(dataset)
    show_deleted(context, "dataset", dataset, as_json=as_json)


@commands.command()
def feedback(
    context: Context,
    *,
    task: TaskName,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", exists=True, dir_okay=False, show_default=False)
    ] = None,
    label: Annotated[str | None, typer.Option(help="What the images show.")] = None,
    new_label: Annotated[bool, typer.Option("--new-label", help="The task need not know the label.")] = False,
    withdraw: Annotated[str | None, typer.Option(metavar="SHA256", help="Forget this image's feedback.")] = None,
    as_json: Json = False,
) -> None:
    """Say what images show, or show what has been said about a task.

    `lensrack datasets from-feedback TASK` makes a dataset of it.
    """
    if bool(images) != (label is not None):
        raise InvalidInput("give images and their --label, or neither to see what has been said")
    said: list[dict[str, Any]] = []
    if withdraw is not None:
        client_of(context).tasks.delete_feedback(task, withdraw)
        term.say(f"feedback {withdraw} withdrawn")
        said.append({"withdrawn": withdraw})
    for image in images or ():
        [item] = client_of(context).feedback(task, image, cast(str, label), new_label=new_label).items
        before = f", before {item.previous}" if item.previous not in (None, item.label) else ""
        term.say(f"{image}: {item.label}{before}")
        said.append({"image": str(image), **item.model_dump()})
    if not images and withdraw is None:
        page = client_of(context).tasks.feedback(task)
        term.print_json(page) if wants_json(context, as_json) else term.show_feedback(page)
    elif wants_json(context, as_json):
        term.print_json(said)
