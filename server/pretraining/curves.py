"""`python -m server.pretraining.curves RUN PICTURE`: draws the curves of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m server.pretraining.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="folder that a run wrote, or its curves.jsonl")
    parser.add_argument("picture", type=Path, help="where to draw: .svg or .png")
    options = parser.parse_args(arguments)
    file = options.run / "curves.jsonl" if options.run.is_dir() else options.run
    draw([json.loads(line) for line in file.read_text().splitlines()], options.picture)


def draw(points: Sequence[dict[str, Any]], picture: Path) -> None:
    """Draw against the number of training views: the error of some states, and the figures of held-out views."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "curves"  # the same curves are the same file
    from matplotlib import pyplot

    views = [point["views"] / 1000 for point in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    depth = len(points[0]["states"]) - 1
    for state in sorted({0, 1, depth // 2, depth}):
        name = "patch embedding" if state == 0 else f"after block {state}"
        left.plot(views, [point["states"][state] for point in points], label=name)
    left.set(title="error of the states, last batch", ylabel="of the teacher's variance", ylim=(0, 1))
    for name, label in (
        ("error", "error of the features"),
        ("cosine", "cosine of the class token"),
        ("votes", "same class"),
    ):
        right.plot(views, [point[name] for point in points], label=label)
    right.set(title="held-out views, 224 px", ylim=(0, None))
    for axes in (left, right):
        for before, after in pairwise(points):
            if before["size"] != after["size"]:
                axes.axvline(before["views"] / 1000, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel("thousand views")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
