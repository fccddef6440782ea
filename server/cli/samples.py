"""`python -m server sample | sample-tasks`: pictures and tasks to try things out with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .root import load_settings, start_logging


def sample(folder: Annotated[Path, typer.Argument(help="Where to draw: FOLDER/fruit and FOLDER/weather.")]) -> None:
    """Draw two small labelled picture sets to try things out with."""
    from server.cli.sample_pictures import draw

    draw(folder)
    typer.echo(f"drew {folder}/fruit and {folder}/weather: class folders under train/ and test/")


def sample_tasks() -> None:
    """Fit the tasks that come with the bundled backbone anew, from pictures that Python packages ship."""
    start_logging(load_settings())
    from server.cli.sample_tasks import make

    for task, accuracy in make().items():
        typer.echo(f"{task}: test accuracy {accuracy:.3f}")
