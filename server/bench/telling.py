"""How a benchmark tells what it found: tables on the screen, figures and a picture in files, and what they are of."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .figures import machine


def add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    parser.add_argument("--picture", type=Path, help="where to save an SVG of them (needs matplotlib)")


def stated(name: str, options: argparse.Namespace, *, dtype: str, seeds: str) -> dict[str, Any]:
    """What figures are worth nothing without. dtype: of the arithmetic; seeds: of whatever was drawn."""
    asked = {key: _plain(value) for key, value in vars(options).items() if key not in ("json", "picture")}
    return {"benchmark": name, "machine": machine(), "dtype": dtype, "seeds": seeds, "options": asked}


def tell(
    report: Mapping[str, Any], tables: str, options: argparse.Namespace, draw: Callable[[Mapping[str, Any]], str]
) -> None:
    """tables: Markdown, what has not been shown yet. `report` has what `stated` gives."""
    show("\n\n".join(filter(None, (tables, facts(report)))) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.picture is not None:
        options.picture.write_text(draw(report))


def show(markdown: str) -> None:
    """Tables with lines for who looks at a terminal and has rich; as they are for a file, a pipe, a page."""
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


def facts(report: Mapping[str, Any]) -> str:
    """A line, of what `stated` gives."""
    of = report["machine"]
    where = (
        f"{of['cores']} cores of {of['processor']}, {of['cuda'] or 'no GPU'}, load {of['load_average'][0]:g} at the end"
    )
    versions = ", ".join(f"{name} {of[name]}" for name in ("python", "torch", "timm", "lensrack"))
    return f"{report['benchmark']}: {where}; {versions}; dtype: {report['dtype']}; seeds: {report['seeds']}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
