"""Extending an immutable dataset: its pictures and some more make a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace

from server.errors import Conflict

from .dataset import MIN_TRAIN, Example, Skipped, bad_dataset
from .report import WarningText


def merge_examples(parent: Sequence[Example], added: Iterable[Example], max_images: int) -> list[Example]:
    """The parent's examples and the added ones, no picture twice. Raises BadRequest bad_dataset beyond `max_images`.

    A picture that the parent has keeps its split, so that nothing leaks from test into train, and takes the label of
    the last example that was added for it.
    """
    known = {example.sha256 for example in parent}
    relabelled: dict[str, str] = {}
    new: dict[tuple[str, str, str], Example] = {}
    for example in added:
        if example.sha256 in known:
            relabelled[example.sha256] = example.label
        else:
            new.setdefault((example.split, example.label, example.sha256), example)
    count = len(parent) + len(new)
    if count > max_images:
        detail = f"with its parent's the dataset has {count:,} pictures; at most {max_images:,} are allowed"
        raise bad_dataset(detail)
    kept = [replace(example, label=relabelled.get(example.sha256, example.label)) for example in parent]
    return kept + list(new.values())


def drop_rare_labels(examples: Sequence[Example], labels: Collection[str]) -> tuple[list[Example], list[Skipped]]:
    """Drop examples of labels that are not in `labels` and have too few training pictures; returns kept and skipped."""
    train = Counter(example.label for example in examples if example.split == "train")
    rare = {e.label for e in examples if train[e.label] < MIN_TRAIN} - set(labels)
    reason = "the new class {!r} has {} in train; expected at least {}"
    skipped = [
        Skipped(f"{e.label}/{e.name}", reason.format(e.label, pictures(train[e.label]), MIN_TRAIN))
        for e in examples
        if e.label in rare
    ]
    return [e for e in examples if e.label not in rare], skipped


def nothing_new(parent: str, skipped: Sequence[Skipped]) -> Conflict:
    """The error where an extension has no picture and no label that the parent does not have."""
    detail = f"nothing is new: dataset {parent[:12]} has all of these pictures under these labels"
    if skipped:
        detail = f"nothing is new for dataset {parent[:12]}; left out: {len(skipped)}, the first: {skipped[0].name}: "
        detail += skipped[0].reason
    return Conflict(detail, code="nothing_new", parent=parent, skipped=[asdict(skip) for skip in skipped])


def rare_labels(counts: Mapping[str, int]) -> list[WarningText]:
    """A warning for each new label that has too few pictures so far."""
    text = "the new class {!r} has {} so far; it is left out of training until it has {}"
    return [WarningText("rare_label", text.format(label, pictures(n), MIN_TRAIN)) for label, n in counts.items()]


def pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
