"""`python -m server sample | sample-tasks`: sample pictures and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .root import load_settings, start_logging


def sample(
    folder: Annotated[Path, typer.Argument(help="Where to write FOLDER/fruit and FOLDER/weather.")],
    per_class: Annotated[int, typer.Option(min=2, help="Training pictures of each class.")] = 24,
) -> None:
    """Draw two small labelled picture sets to try lensrack with."""
    from server.cli.sample_pictures import draw

    draw(folder, per_class=per_class)
    typer.echo(f"drew {folder}/fruit and {folder}/weather: class folders under train/ and test/")


def sample_tasks() -> None:
    """Fit the bundled tasks again, from pictures that Python packages contain."""
    start_logging(load_settings())
    from server.cli.sample_tasks import make

    for task, accuracy in make().items():
        typer.echo(f"{task}: test accuracy {accuracy:.3f}")
