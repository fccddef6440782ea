"""Shows a comparison as a Markdown table, or as a plot of accuracy over fitted parameters.

The plot needs matplotlib, from the extra `lensrack[plot]`; the table needs nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .errors import InvalidInput
from .wire import ComparedMethod, Comparison

HEAD = ("method", "accuracy", "parameters", "bundle", "lens", "forward", "fit", "CPU")


def markdown(comparison: Comparison) -> str:
    """Return a table with a row for each method, the best accuracy first."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return "\n".join(lines + [f"| {' | '.join(cells(comparison, row))} |" for row in ranked(comparison)])


def ranked(comparison: Comparison) -> list[ComparedMethod]:
    """Return the methods, the best accuracy first."""
    return sorted(comparison.rows, key=lambda row: -(_accuracy(comparison, row)[0] or 0))


def cells(comparison: Comparison, row: ComparedMethod) -> tuple[str, ...]:
    """Return a row's cells, as `HEAD` names them: per cent, count, kB, kB, times the plain ViT, seconds, seconds."""
    mean, deviation = _accuracy(comparison, row)
    spread = f" ± {100 * deviation:.1f}" if deviation is not None else ""
    accuracy = "diverged" if mean is None else f"{100 * mean:.1f}{spread}"
    if mean is not None and row.diverged:
        accuracy += f" ({row.diverged} of {row.fits} diverged)"
    return (
        row.method,
        accuracy,
        "–" if row.parameters is None else f"{row.parameters:,}",
        _kilobytes(row.bundle_bytes),
        _kilobytes(row.lens_bytes),
        "–" if row.forward_cost is None else f"× {row.forward_cost:.2f}",
        f"{row.fit_s:,.0f} s",
        f"{row.cpu_s:,.0f} s",
    )


def draw(comparisons: Sequence[Comparison]) -> str:
    """Return an SVG with a panel for each comparison: accuracy (± a standard deviation) over fitted parameters.

    Filled markers are methods that can be served. Raises InvalidInput where matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInput("a plot needs matplotlib: pip install 'lensrack[plot]'") from error
    with rc_context({"svg.hashsalt": "lensrack", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(4.6 * max(1, len(comparisons)), 3.8), layout="constrained")
        for number, comparison in enumerate(comparisons, start=1):
            _panel(figure.add_subplot(1, len(comparisons), number), comparison)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def _panel(axes: Any, comparison: Comparison) -> None:
    for row in comparison.rows:
        mean, deviation = _accuracy(comparison, row)
        if mean is None or row.parameters is None:
            continue
        at = row.parameters, 100 * mean
        colour, fill = ("C0", "full") if row.servable else ("C3", "none")
        axes.errorbar(*at, yerr=100 * (deviation or 0), fmt="o", color=colour, fillstyle=fill, capsize=2, lw=0.8)
        axes.annotate(row.method, at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", title=comparison.title, xlabel="parameters fitted")
    axes.set_ylabel(f"{'test' if comparison.dataset_split == 'test' else 'validation'} accuracy, %")
    axes.grid(alpha=0.25, lw=0.5)
    axes.margins(x=0.12)


def _accuracy(comparison: Comparison, row: ComparedMethod) -> tuple[float | None, float | None]:
    if comparison.dataset_split == "test":
        return row.test_accuracy, row.test_accuracy_std
    return row.val_accuracy, row.val_accuracy_std


def _kilobytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1000:,.0f} kB"
