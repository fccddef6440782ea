"""Pictures of benchmarks: small, the same bytes for the same figures, with text kept as text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, OTHER = "#1f77b4", "#d0d7de"
LINES = ("#1f77b4", "#9ec5e8", "#57606a", "#bf8700", "#cf222e")


def style() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "lensrack", "svg.fonttype": "none", "font.size": 8})


def as_svg(figure: Figure) -> str:
    """The figure as SVG. Call it within `style`."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


@dataclass(frozen=True)
class Panel:
    """A group of comparable bars: lengths by name, in `unit`. Those in `ours` are filled."""

    title: str
    unit: str
    bars: Mapping[str, float]
    ours: Sequence[str] = ()


def bars(panels: Sequence[Panel]) -> str:
    """SVG: the panels below each other, their bars from top to bottom."""
    from matplotlib.figure import Figure

    with style():
        heights = [1.0 + 0.24 * len(panel.bars) for panel in panels]
        figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
        places = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel in zip(places, panels, strict=True):
            names = [*panel.bars][::-1]
            colours = [OURS if name in panel.ours else OTHER for name in names]
            drawn = axes.barh(names, [panel.bars[name] for name in names], color=colours)
            axes.bar_label(drawn, fmt="%.4g", padding=2)
            axes.set(title=panel.title, xlabel=panel.unit)
            axes.margins(x=0.1)
            axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure)
