"""What all commands share: the client, made of the global options, and common arguments."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import typer

from lensrack import Client, _completion
from lensrack import _terminal as term
from lensrack.errors import InvalidInput

Context = typer.Context
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", autocompletion=_completion.tasks)]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="A version, or a unique prefix of one.")]
SourcePath = Annotated[Path, typer.Argument(metavar="PATH", help="A folder, an archive, or - for stdin.")]
Images = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE...", help="Images, folders of them, or - for standard input."),
]
DatasetName = Annotated[str | None, typer.Option("--name", help="A name for people; the id stays the same.")]
Resume = Annotated[str | None, typer.Option("--resume", metavar="UPLOAD", help="Continue an interrupted upload.")]
DatasetId = Annotated[
    str, typer.Argument(metavar="DATASET", help="The dataset's id.", autocompletion=_completion.datasets)
]
DatasetOption = Annotated[str, typer.Option("--dataset", help="The dataset's id.", autocompletion=_completion.datasets)]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=_completion.jobs)]


@dataclass(frozen=True)
class Session:
    """The client and the output format of one invocation."""

    client: Client
    json: bool


def client_of(context: Context) -> Client:
    return cast(Session, context.obj).client


def wants_json(context: Context, as_json: bool) -> bool:
    """Whether --json was given: after the command (`as_json`) or before it."""
    return as_json or cast(Session, context.obj).json


def show_deleted(context: Context, what: str, name: str, *, as_json: bool) -> None:
    if wants_json(context, as_json):
        term.print_json({"deleted": name})
    else:
        term.say(f"{what} {name} deleted")


def require_consent(question: str) -> None:
    """Ask at the terminal, and exit with 1 after anything but yes. Raises InvalidInput where nobody can answer."""
    if not sys.stdin.isatty():
        raise InvalidInput(f"{question} Standard input is no terminal that could answer: --yes does it without asking")
    typer.confirm(question, abort=True, err=True)
