"""`python -m server store export | import`: back up and restore a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from prompts_store import Store, StoreError, open_store

from .root import load_settings, start_logging

NOT_EXPORTED: Final = "data sets, feedback, jobs, keys and the backbone"

cli = typer.Typer(no_args_is_help=True, help="Back a store up, restore it, or move it to another kind of store.")
StoreUrl = Annotated[str | None, typer.Option("--store", help="Store URL (default: LENSRACK_STORE, else HOME/store).")]


@cli.command("export")
def store_export(
    path: Annotated[Path, typer.Argument(help="A folder, or a file if the name ends in .tar.")], store: StoreUrl = None
) -> None:
    """Write a whole store into an archive: bundles, aliases and their history. It does not hold data sets, feedback,
    jobs, keys and the backbone."""
    from prompts_store.transfer import export_store

    with _transfer("exported", store) as opened:
        done = export_store(opened, path)
        what = f"exported {done.versions} versions of {done.tasks} tasks"
        typer.echo(f"{what}, {done.written} of them new in the archive")
        typer.echo(f"the archive does not hold {NOT_EXPORTED}: docs/howto-backup.md saves these as well", err=True)


@cli.command("import")
def store_import(
    path: Annotated[Path, typer.Argument(help="An archive that `store export` wrote.")],
    store: StoreUrl = None,
    overwrite: Annotated[bool, typer.Option(help="Overwrite aliases that point elsewhere in the store.")] = False,
) -> None:
    """Add an archive to a store. Nothing is written unless the whole archive is intact."""
    from prompts_store.transfer import import_store

    with _transfer("imported", store) as opened:
        done = import_store(opened, path, overwrite=overwrite)
        typer.echo(f"imported {done.versions} versions of {done.tasks} tasks, {done.written} of them new in the store")


@contextmanager
def _transfer(verb: str, url: str | None) -> Iterator[Store]:
    """The store, closed at the end. A failure is printed, with exit status 1."""
    settings = load_settings(store=url)
    start_logging(settings)
    try:
        with closing(open_store(settings.store_url)) as store:
            yield store
    except (StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was {verb} in full: {error}", err=True)
        raise typer.Exit(1) from None
