"""`python -m server backbones | import | export`: supported backbones, and versions from and for other tools."""

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
    """List which of timm's ViT families can be served, and why the others cannot."""
    from server.engine.architectures import architectures, table

    entries = list(architectures())
    served = sum(entry.incompatibility is None for entry in entries)
    typer.echo(table(entries) + f"\n{served} of {len(entries)} architectures are served.")


def import_(
    *,
    task: Annotated[str, typer.Argument(help="The task to store the version under.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", exists=True, dir_okay=False)],
    form: Annotated[str, typer.Option("--format", help="vpt, spt, cvpt, peft, timm, transformers, or auto.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text file with one class name a line.")
    ] = None,
    preprocess: Annotated[
        str,
        typer.Option(help="JSON of preprocessing: mean, std, interpolation, crop_pct, crop_mode."),
    ] = "{}",
    alias: Annotated[str | None, typer.Option(help="Alias to point at the version, such as live.")] = None,
    store: Annotated[str | None, typer.Option(help="Store URL (default: LENSRACK_STORE, else HOME/store).")] = None,
) -> None:
    """Store another tool's checkpoint as a version of a task and print the version. See docs/howto-import.md."""
    from server.errors import ServiceError
    from server.importing.importer import ImportOptions

    class_names = labels.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n") if labels else None
    options = ImportOptions(task, form, class_names, _json_object("--preprocess", preprocess))
    try:
        with _backbone_and_store(store) as (backbone, opened), ExitStack() as stack:
            from server.app.backbone import BackboneInfo, importer_for
            from server.methods.registry import Registry

            named_files = [(file.name, stack.enter_context(file.open("rb"))) for file in files]
            bundle = importer_for(BackboneInfo.of(backbone), Registry.installed()).bundle(named_files, options, opened)
            opened.put(bundle)
            if alias is not None:
                opened.set_alias(task, alias, bundle.version)
    except (ServiceError, StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was imported: {error}", err=True)
        raise typer.Exit(1) from None
    recipe = bundle.manifest.recipe
    summary = f"read as {recipe['imported_from']}, {bundle.manifest.method}; backbone {recipe['backbone']}"
    typer.echo(summary, err=True)
    typer.echo(bundle.version)


def export(
    *,
    task: Annotated[
        str, typer.Argument(metavar="TASK[@ALIAS|@VERSION]", help="The task, by default its live version.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="onnx: the whole model. timm: a state dict.")],
    takes: Annotated[
        ExportInput, typer.Option("--input", help="Input of the ONNX model: uint8 pictures, or normalised floats.")
    ] = "uint8",
    store: Annotated[str | None, typer.Option(help="Store URL (default: LENSRACK_STORE, else HOME/store).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Export a version for other tools: an ONNX model, or a timm state dict. See docs/howto-import.md."""
    from server.errors import ServiceError

    try:
        with _backbone_and_store(store) as (backbone, opened):
            from server.exporting.to_onnx import Input, to_onnx
            from server.exporting.to_timm import to_timm
            from server.methods.registry import Registry

            bundle = opened.get(*_resolve(opened, task))
            registry = Registry.installed()
            registry.check(bundle, backbone.spec)
            data = to_timm(bundle, backbone) if form == "timm" else to_onnx(bundle, backbone, registry, Input(takes))
        with output.open("wb" if force else "xb") as file:
            file.write(data)
    except (ServiceError, StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was exported: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {bundle.manifest.task} {bundle.version[:12]}, {bundle.manifest.method}", err=True)


def _resolve(store: Store, name: str) -> tuple[str, str]:
    """Task and version of `task`, `task@alias` or `task@` and a version's first digits. Raises StoreError."""
    task, _, suffix = name.partition("@")
    aliases = store.aliases(task)
    if (suffix or "live") in aliases:
        return task, aliases[suffix or "live"].heaviest
    matching = [info.version for info in store.versions(task) if suffix and info.version.startswith(suffix)]
    if len(matching) != 1:
        raise VersionNotFound(task, suffix or "live")
    return task, matching[0]


def _json_object(option: str, text: str) -> dict[str, Any]:
    """An option's value as a JSON object. Raises typer.BadParameter."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text[:100]}", param_hint=option)
    return value


@contextmanager
def _backbone_and_store(url: str | None) -> Iterator[tuple[Any, Store]]:
    """The backbone in float32 on the CPU, whatever the server uses, so that nothing is rounded; and the store."""
    settings = load_settings(store=url, device="cpu", dtype="float32", packed=False)
    start_logging(settings)
    from server.app.backbone import load_backbone

    backbone = load_backbone(settings, settings.threads or os.cpu_count() or 1)
    with closing(open_store(settings.store_url)) as store:
        yield backbone, store
