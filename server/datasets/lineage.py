"""Extending an immutable dataset: its pictures and some more make a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from .dataset import MIN_TRAIN, Example, Skipped, bad_dataset


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
    rare = {label for label, count in train.items() if count < MIN_TRAIN and label not in labels}
    reason = f"its label has no other training picture; expected at least {MIN_TRAIN}"
    skipped = [Skipped(f"{e.label}/{e.name}", reason) for e in examples if e.label in rare]
    return [e for e in examples if e.label not in rare], skipped
