"""`python -m server backbones | import | export`: what can be served, and versions from and for other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prompts_store import Store, StoreError, VersionNotFound, open_store

from .root import load_settings, start_logging

ExportFormat = Literal["onnx", "timm"]
ExportInput = Literal["uint8", "float"]


def backbones() -> None:
    """List the ViT families of timm that can be served, and why the others cannot."""
    from server.engine.architectures import architectures, table

    found = list(architectures())
    served = sum(one.incompatibility is None for one in found)
    typer.echo(table(found) + f"\n{served} of {len(found)} architectures are served.")


def import_(
    *,
    task: Annotated[str, typer.Argument(help="The task to store it under.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", exists=True, dir_okay=False)],
    form: Annotated[str, typer.Option("--format", help="vpt, spt, cvpt, peft, timm, or auto.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file, a class's name a line.")
    ] = None,
    preprocess: Annotated[str, typer.Option(help="JSON: mean, std, interpolation, crop_pct, crop_mode.")] = "{}",
    alias: Annotated[str | None, typer.Option(help="An alias to point at it, such as live.")] = None,
    store: Annotated[str | None, typer.Option(help="Which store (LENSRACK_STORE, else HOME/store).")] = None,
) -> None:
    """Store another tool's checkpoint as a version of a task; prints the version. See docs/howto-import.md."""
    from server.errors import ServiceError
    from server.importing.importer import ImportOptions

    words = labels.read_text(encoding="utf-8").splitlines() if labels else None
    wanted = ImportOptions(task, form, words, _object("--preprocess", preprocess))
    try:
        with _backbone_and_store(store) as (backbone, opened), ExitStack() as stack:
            from server.app.backbone import BackboneInfo, importer_for
            from server.methods.registry import Registry

            given = [(file.name, stack.enter_context(file.open("rb"))) for file in files]
            bundle = importer_for(BackboneInfo.of(backbone), Registry.installed()).bundle(given, wanted, opened)
            opened.put(bundle)
            if alias is not None:
                opened.set_alias(task, alias, bundle.version)
    except (ServiceError, StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was imported: {error}", err=True)
        raise typer.Exit(1) from None
    recipe = bundle.manifest.recipe
    told = f"read as {recipe['imported_from']}, {bundle.manifest.method}; backbone {recipe['backbone']}"
    typer.echo(told, err=True)
    typer.echo(bundle.version)


def export(
    *,
    task: Annotated[str, typer.Argument(metavar="TASK[@ALIAS|@VERSION]", help="The task; without more, what is live.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="onnx: the whole model. timm: a state dict.")],
    takes: Annotated[
        ExportInput, typer.Option("--input", help="onnx: uint8 pictures, or normalised floats.")
    ] = "uint8",
    store: Annotated[str | None, typer.Option(help="Which store (LENSRACK_STORE, else HOME/store).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a task for other tools: an ONNX model, or a timm state dict. See docs/howto-import.md."""
    from server.errors import ServiceError

    try:
        with _backbone_and_store(store) as (backbone, opened):
            from server.exporting.to_onnx import Input, to_onnx
            from server.exporting.to_timm import to_timm
            from server.methods.registry import Registry

            bundle = opened.get(*_version(opened, task))
            registry = Registry.installed()
            registry.check(bundle, backbone.spec)
            whole = to_timm(bundle, backbone) if form == "timm" else to_onnx(bundle, backbone, registry, Input(takes))
        with output.open("wb" if force else "xb") as file:
            file.write(whole)
    except (ServiceError, StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was exported: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {bundle.manifest.task} {bundle.version[:12]}, {bundle.manifest.method}", err=True)


def _version(store: Store, name: str) -> tuple[str, str]:
    """Task and version of `task`, `task@alias` or the beginning of a version. Raises StoreError."""
    task, _, which = name.partition("@")
    aliases = store.aliases(task)
    if (which or "live") in aliases:
        return task, max(aliases[which or "live"].targets, key=lambda target: target.weight).version
    found = [info.version for info in store.versions(task) if which and info.version.startswith(which)]
    if len(found) != 1:
        raise VersionNotFound(task, which or "live")
    return task, found[0]


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text[:100]}", param_hint=option)
    return value


@contextmanager
def _backbone_and_store(url: str | None) -> Iterator[tuple[Any, Store]]:
    """In float32 on the CPU, whatever the server runs in: nothing is lost on the way."""
    settings = load_settings(store=url, device="cpu", dtype="float32", packed=False)
    start_logging(settings)
    from server.app.backbone import load_backbone

    backbone = load_backbone(settings, settings.threads or os.cpu_count() or 1)
    with closing(open_store(settings.store_url)) as store:
        yield backbone, store
