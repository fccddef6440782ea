"""`lensrack evaluate`: the figures at the terminal, and every picture that was answered wrongly or not at all."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import _archive
from . import _terminal as term
from ._evaluation import Evaluation

MATRIX = 12  # classes of a confusion matrix that a terminal can show; of more, the most frequent confusions
SHOWN = 10  # pictures and confusions


@contextmanager
def picture_bar(name: str) -> Iterator[_archive.Progress]:
    """Show a bar of the pictures answered."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=term.console(stderr=True)) as bar:
        task = bar.add_task(term.plain(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(scores: Evaluation) -> None:
    low, high = scores.interval
    accuracy = f"accuracy {scores.accuracy:.1%} ({scores.correct} of {scores.images})"
    print(f"{accuracy}, 95 % interval {low:.1%} to {high:.1%} (Wilson)")
    rows = [
        (one.label, one.images, one.correct, _percent(one.recall), _percent(one.precision)) for one in scores.classes
    ]
    print()
    term.print_table(("label", "images", "correct", "recall", "precision"), rows, "no classes")
    print()
    _show_confusion(scores)
    for mistake in scores.wrong[:SHOWN]:
        term.say(f"{mistake.image}: {mistake.label}, answered {mistake.answer} ({mistake.score:.2f})")
    if len(scores.wrong) > SHOWN:
        term.say(f"… and {len(scores.wrong) - SHOWN} more answered wrongly: --csv FILE or --json lists all")
    for picture in scores.unreadable:
        term.say(f"error: {picture.image}: {picture.error}")
    if scores.unknown_labels:
        term.say(f"no classes of the task, so never right: {', '.join(scores.unknown_labels)}")
    if str(scores.left_out):
        term.say(f"left out: {scores.left_out}")


def _show_confusion(scores: Evaluation) -> None:
    """Print the matrix, a row for each label and a column for each answer; of many classes the commonest confusions."""
    labels = [one.label for one in scores.classes]
    counts = scores.confusion
    if len(labels) <= MATRIX:
        rows = [(label, *(counts[label].get(answer, 0) for answer in labels)) for label in labels if label in counts]
        term.print_table(("label \\ answer", *map(term.plain, labels)), rows, "no answers")
        return
    pairs = [(n, label, answer) for label, row in counts.items() for answer, n in row.items() if answer != label]
    commonest = [(label, answer, n) for n, label, answer in sorted(pairs, reverse=True)[:SHOWN]]
    term.print_table(("label", "answer", "images"), commonest, "no confusions")


def write_csv(scores: Evaluation, path: Path) -> None:
    """Write a row for each picture that was answered wrongly or not at all."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "label", "answer", "score", "error"))
        writer.writerows((wrong.image, wrong.label, wrong.answer, wrong.score, "") for wrong in scores.wrong)
        writer.writerows((picture.image, picture.label, "", "", picture.error) for picture in scores.unreadable)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
