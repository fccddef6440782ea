"""Commands for bundles and other tools' checkpoints as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lensrack import _completion, wire
from lensrack import _terminal as term
from lensrack._endpoints import live_version
from lensrack.errors import InvalidInput

from .session import Context, Json, TaskName, client_of, wants_json

commands = typer.Typer()
ENDINGS = {"onnx": ".onnx", "timm": "-timm.safetensors", "bundle": ".safetensors"}
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
    version = version or live_version(client_of(context).tasks.get(task))
    data = client_of(context).tasks.download(task, version)
    path = output or Path(f"{task}-{version[:12]}.safetensors")
    with path.open("wb" if force else "xb") as file:
        file.write(data)
    if wants_json(context, as_json):
        term.print_json({"task": task, "version": version, "path": str(path), "bytes": len(data)})
    else:
        print(path)


@commands.command("export")
def export(
    context: Context,
    *,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK[@ALIAS|@VERSION]",
            help="The task, by default its live version.",
            autocompletion=_completion.tasks,
        ),
    ],
    form: Annotated[
        str, typer.Option("--format", help="onnx: the whole model. timm: a state dict. bundle: as it is stored.")
    ] = "onnx",
    takes: Annotated[
        str, typer.Option("--input", help="Input of the ONNX model: uint8 pictures, or normalised float.")
    ] = "uint8",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Save a version for other tools: an ONNX model, or a timm state dict; prints the file's name.

    The server needs some seconds for it.
    """
    if form not in ENDINGS or takes not in ("uint8", "float"):
        raise InvalidInput(f"expected --format {', '.join(ENDINGS)} and --input uint8 or float, got {form} and {takes}")
    tasks, (name, _, ref) = client_of(context).tasks, task.partition("@")
    stored = tasks.get(name)
    aliases = {alias.name: max(alias.targets, key=lambda target: target.weight).version for alias in stored.aliases}
    version = aliases.get(ref, ref) if ref else live_version(stored)
    path = output or Path(f"{name}-{version[:12]}{ENDINGS[form]}")
    if path.exists() and not force:
        raise InvalidInput(f"{path} exists: --force replaces it")
    data = tasks.export(name, version, format=cast(wire.ExportFormat, form), input=cast(wire.ExportInput, takes))
    path.write_bytes(data)
    if wants_json(context, as_json):
        term.print_json({"task": name, "version": version, "format": form, "path": str(path), "bytes": len(data)})
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
    names = labels.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n") if labels else None
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
