"""Adding to what never changes: the pictures of a dataset and some more are the pictures of a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from .dataset import MIN_TRAIN, Example, Skipped, bad


def joined(parent: Sequence[Example], added: Iterable[Example], max_images: int) -> list[Example]:
    """The parent's examples and the added ones, no picture twice. Raises BadRequest bad_dataset when they are too many.

    A picture that the parent has keeps its split, so that nothing leaks from test into train, and takes the label that
    was said last.
    """
    known = {example.sha256 for example in parent}
    said: dict[str, str] = {}
    fresh: dict[tuple[str, str, str], Example] = {}
    for example in added:
        if example.sha256 in known:
            said[example.sha256] = example.label
        else:
            fresh.setdefault((example.split, example.label, example.sha256), example)
    count = len(parent) + len(fresh)
    if count > max_images:
        raise bad(f"together with its parent's the dataset has {count:,} pictures; at most {max_images:,} are allowed")
    kept = [replace(example, label=said.get(example.sha256, example.label)) for example in parent]
    return kept + list(fresh.values())


def without_lone(examples: Sequence[Example], labels: Collection[str]) -> tuple[list[Example], list[Skipped]]:
    """The examples of `labels`, and of other labels where there are enough to learn from; those left out, with why."""
    train = Counter(example.label for example in examples if example.split == "train")
    lone = {label for label, count in train.items() if count < MIN_TRAIN and label not in labels}
    reason = f"its label has no other training picture; expected at least {MIN_TRAIN}"
    skipped = [Skipped(f"{one.label}/{one.name}", reason) for one in examples if one.label in lone]
    return [one for one in examples if one.label not in lone], skipped
