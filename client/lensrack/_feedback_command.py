"""`lensrack feedback`: the correct label of images, one request for each, so that one bad image spoils no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from . import _terminal as term
from . import wire
from ._folders import LeftOut
from ._predict_command import found, source_of
from .errors import LensrackError, concerns_image


def send(
    store: Callable[[Any], wire.Feedback], paths: list[Path], items: list[dict[str, Any]], *, as_json: bool
) -> None:
    """Store the label of all pictures, print what became of each, and exit with 1 if one was refused.

    Raises errors that concern all pictures, such as an unknown label.
    """
    left_out, failed = LeftOut(), 0
    warnings: list[wire.DatasetWarning] = []
    for image in found(paths, left_out):
        try:
            stored = store(source_of(image))
        except LensrackError as error:
            if (len(paths) == 1 and not paths[0].is_dir()) or not _concerns_picture(error):
                raise
            failed += 1
            term.print_error(error, about=str(image))
            items.append({"image": str(image), "error": str(error)})
            continue
        [item], warnings = stored.items, stored.warnings
        before = f", before {item.previous}" if item.previous not in (None, item.label) else ""
        term.say(f"{image}: {item.label}{before}")
        items.append({"image": str(image), **item.model_dump()})
    for warning in warnings:  # of the last image: those before it may not be true any more
        term.say(f"warning: {warning.text}")
    if str(left_out):
        term.say(f"left out: {left_out}")
    if as_json:
        term.print_json(items)
    if failed:
        raise typer.Exit(1)


def _concerns_picture(error: LensrackError) -> bool:
    return concerns_image(error) and getattr(error, "status", 0) != 422  # which is about the label
