"""A dataset: immutable labelled images, identified by a digest of their content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Final, Self

from server.errors import BadRequest

from .example import SPLITS, Example, Skipped, Split, natural
from .report import Report

__all__ = ["MIN_TRAIN", "SPLITS", "Dataset", "Example", "Skipped", "Split", "bad_dataset", "check", "digest", "natural"]

FORMAT: Final = 2  # of the manifest; format 1 has no report, and no format and mode of each picture
MIN_TRAIN: Final = 2  # training pictures of a class: one to learn from and one to hold out


@dataclass(frozen=True, slots=True)
class Dataset:
    """`labels` are in natural order; a label's index is its class number. `created_at` is in seconds since the epoch.
    `parent` is the id of the dataset that this one extends, which may have been deleted since."""

    id: str
    name: str
    labels: tuple[str, ...]
    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]
    report: Report
    created_at: float
    parent: str | None = None

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        skipped: Sequence[Skipped],
        *,
        name: str,
        created_at: float,
        parent: str | None = None,
    ) -> Self:
        """Raises `BadRequest` bad_dataset when nothing can be learned from the examples."""
        check(examples, skipped)
        labels = sorted({example.label for example in examples}, key=natural)
        ordered = sorted(examples, key=lambda e: (SPLITS.index(e.split), natural(e.label), natural(e.name)))
        report = Report.of(ordered, len(skipped))
        return cls(digest(examples), name, tuple(labels), tuple(ordered), tuple(skipped), report, created_at, parent)

    @property
    def images(self) -> int:
        return len(self.examples)

    @property
    def bytes(self) -> int:
        return sum(example.bytes for example in self.examples)

    @property
    def splits(self) -> dict[str, dict[str, int]]:
        """split → label → number of images; splits without images are left out."""
        counts = Counter((example.split, example.label) for example in self.examples)
        used = [split for split in SPLITS if any(split == used_split for used_split, _ in counts)]
        return {split: {label: counts[split, label] for label in self.labels} for split in used}

    def to_json(self) -> str:
        """The manifest: examples as rows, in the order of Example's fields."""
        head = {"format": FORMAT, "id": self.id, "name": self.name, "labels": self.labels}
        head |= {"created_at": self.created_at, "parent": self.parent, "report": self.report.to_json()}
        skipped = [asdict(skip) for skip in self.skipped]
        return json.dumps({**head, "examples": [astuple(example) for example in self.examples], "skipped": skipped})

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields: Mapping[str, Any] = json.loads(text)
        if fields["format"] not in (1, FORMAT):
            raise ValueError(f"a manifest of format {fields['format']}, expected 1 or {FORMAT}")
        examples = tuple(Example(*row) for row in fields["examples"])
        skipped = tuple(Skipped(**row) for row in fields["skipped"])
        report = fields.get("report")
        return cls(
            fields["id"],
            fields["name"],
            tuple(fields["labels"]),
            examples,
            skipped,
            Report.from_json(report) if report else Report.of(examples, len(skipped)),
            fields["created_at"],
            fields.get("parent"),
        )


def digest(examples: Iterable[Example]) -> str:
    """The dataset's id: a digest of each picture's split, label and content; file names do not count."""
    rows = sorted((example.split, example.label, example.sha256) for example in examples)
    return hashlib.sha256(json.dumps(["lensrack dataset 1", rows], separators=(",", ":")).encode()).hexdigest()


def check(examples: Sequence[Example], skipped: Sequence[Skipped]) -> None:
    """Raise `BadRequest` bad_dataset unless training is possible: two classes, each with two training pictures."""
    labels = sorted({example.label for example in examples}, key=natural)
    train = Counter(example.label for example in examples if example.split == "train")
    if not examples:
        raise bad_dataset("no readable picture with a label; expected class folders, a table or labelled rows", skipped)
    if len(labels) == 1:
        raise bad_dataset(f"expected at least two classes, got one: {labels[0]!r}", skipped)
    for label in labels:
        if label not in train:
            where = ", ".join(sorted({example.split for example in examples if example.label == label}))
            raise bad_dataset(f"class {label!r} has pictures in {where} and none in train", skipped)
        if train[label] < MIN_TRAIN:
            count = f"{train[label]} training picture"
            raise bad_dataset(f"class {label!r} has {count}; expected at least {MIN_TRAIN}", skipped)


def bad_dataset(detail: str, skipped: Sequence[Skipped] = ()) -> BadRequest:
    """A `BadRequest` bad_dataset that lists the first skipped files, since they are often the reason."""
    first = [asdict(skip) for skip in skipped[:20]]
    if skipped:
        detail += f"; files skipped: {len(skipped)}, the first: {skipped[0].name}: {skipped[0].reason}"
    return BadRequest(detail, code="bad_dataset", skipped=first)
