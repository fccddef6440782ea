"""Commands for bundles and other tools' checkpoints as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lensrack import _terminal as term
from lensrack import wire
from lensrack.errors import InvalidInput

from .session import Context, Json, TaskName, client_of, wants_json

commands = typer.Typer()
bundles = typer.Typer(help="Bundles as files.", no_args_is_help=True)


@bundles.command("download")
def download(
    context: Context,
    *,
    task: TaskName,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="Default: the live version.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Save a bundle to a file; prints the file's name."""
    version = version or client_of(context).tasks.get(task).live
    if version is None:
        raise InvalidInput(f"task {task} has no live version: choose one of `lensrack versions {task}`")
    data = client_of(context).tasks.download(task, version)
    path = output or Path(f"{task}-{version[:12]}.safetensors")
    with path.open("wb" if force else "xb") as file:
        file.write(data)
    if wants_json(context, as_json):
        term.print_json({"task": task, "version": version, "path": str(path), "bytes": len(data)})
    else:
        print(path)


@bundles.command("upload")
def upload_bundle(
    context: Context,
    task: TaskName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option("--alias", help="An alias to point at it.")] = None,
    as_json: Json = False,
) -> None:
    """Store a bundle; prints its version."""
    stored = client_of(context).tasks.upload(task, file, alias=name)
    term.print_json(stored) if wants_json(context, as_json) else print(stored.version)


@commands.command("import")
def import_checkpoint(
    context: Context,
    *,
    task: TaskName,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", exists=True, dir_okay=False, show_default=False)],
    form: Annotated[str, typer.Option("--format", help="vpt, spt, cvpt, peft, timm or transformers.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file with a class name on each line.")
    ] = None,
    preprocess: Annotated[str | None, typer.Option(help="JSON: mean, std, interpolation, crop_pct, crop_mode.")] = None,
    name: Annotated[str | None, typer.Option("--alias", help="An alias to point at it.")] = None,
    as_json: Json = False,
) -> None:
    """Store another tool's checkpoint as a version; prints the version.

    Official VPT (prompt_ep*.pth and a file with its head), SPT and CVPT, a timm classifier, a LoRA adapter of PEFT
    (adapter_config.json and adapter_model.safetensors). It must have been fitted on the server's backbone.
    """
    names = labels.read_text(encoding="utf-8").splitlines() if labels else None
    stored = client_of(context).tasks.import_checkpoint(
        task,
        *files,
        format=cast(wire.ImportFormat, form),
        labels=names,
        preprocess=_object(preprocess) if preprocess else None,
        alias=name,
    )
    recipe = stored.recipe
    term.say(f"read as {recipe.get('imported_from')}, {stored.method}; backbone {recipe.get('backbone')}")
    term.print_json(stored) if wants_json(context, as_json) else print(stored.version)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InvalidInput(f"--preprocess: expected a JSON object, got {text[:100]}")
    return value
