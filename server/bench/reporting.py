"""A benchmark's output: tables on the screen, figures and a picture in files, and the conditions of the measurement."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .figures import machine


def add_file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    parser.add_argument("--picture", type=Path, help="where to save an SVG of the figures (needs matplotlib)")


def provenance(name: str, options: argparse.Namespace, *, dtype: str, seeds: str) -> dict[str, Any]:
    """The conditions without which figures are worthless. dtype: of the arithmetic; seeds: of everything that was
    drawn."""
    stated = {key: _plain(value) for key, value in vars(options).items() if key not in ("json", "picture")}
    return {"benchmark": name, "machine": machine(), "dtype": dtype, "seeds": seeds, "options": stated}


def emit(
    report: Mapping[str, Any], tables: str, options: argparse.Namespace, draw: Callable[[Mapping[str, Any]], str]
) -> None:
    """Show the tables, and save figures and picture if files are named. tables: Markdown not shown before; `report`
    includes `provenance`."""
    show("\n\n".join(filter(None, (tables, summary_line(report)))) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.picture is not None:
        options.picture.write_text(draw(report))


def show(markdown: str) -> None:
    """Print Markdown, with ruled tables on a terminal if rich is installed; unchanged for a file or a pipe."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.markdown import Markdown
        except ImportError:
            pass
        else:
            Console().print(Markdown(markdown))
            return
    print(markdown, flush=True)


def summary_line(report: Mapping[str, Any]) -> str:
    """One line of the report's `provenance`."""
    of = report["machine"]
    where = (
        f"{of['cores']} cores of {of['processor']}, {of['cuda'] or 'no GPU'}, load {of['load_average'][0]:g} at the end"
    )
    versions = ", ".join(f"{name} {of[name]}" for name in ("python", "torch", "timm", "lensrack"))
    return f"{report['benchmark']}: {where}; {versions}; dtype: {report['dtype']}; seeds: {report['seeds']}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
