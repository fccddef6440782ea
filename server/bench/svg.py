"""How the benchmarks' pictures are written: small, the same bytes for the same figures, text that stays text."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, OTHER = "#1f77b4", "#d0d7de"
LINES = ("#1f77b4", "#9ec5e8", "#57606a", "#bf8700", "#cf222e")


def style() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "lensrack", "svg.fonttype": "none", "font.size": 8})


def as_svg(figure: Figure) -> str:
    """Call it within `style`."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
