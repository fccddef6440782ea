"""A dataset: immutable labelled images, known by their content digest."""

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

__all__ = ["MIN_TRAIN", "SPLITS", "Dataset", "Example", "Skipped", "Split", "bad", "check", "digest", "natural"]

FORMAT: Final = 2  # of the manifest; 1 knew neither the report nor the pictures' formats and modes
MIN_TRAIN: Final = 2  # training pictures of a class: one to learn from and one to hold out


@dataclass(frozen=True, slots=True)
class Dataset:
    """`labels` are in natural order, so that an index means a label; `created_at` is in seconds since the epoch.
    `parent` is the id of the dataset that this one added to, which may have been deleted since."""

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
        ordered = sorted(examples, key=lambda one: (SPLITS.index(one.split), natural(one.label), natural(one.name)))
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
        """split → label → number of images, of the splits that have any."""
        counts = Counter((example.split, example.label) for example in self.examples)
        used = [split for split in SPLITS if any(split == one for one, _ in counts)]
        return {split: {label: counts[split, label] for label in self.labels} for split in used}

    def to_json(self) -> str:
        """The manifest: examples as rows, in the order of Example's fields."""
        head = {"format": FORMAT, "id": self.id, "name": self.name, "labels": self.labels}
        head |= {"created_at": self.created_at, "parent": self.parent, "report": self.report.to_json()}
        skipped = [asdict(each) for each in self.skipped]
        return json.dumps({**head, "examples": [astuple(each) for each in self.examples], "skipped": skipped})

    @classmethod
    def from_json(cls, text: str) -> Self:
        read: Mapping[str, Any] = json.loads(text)
        if read["format"] not in (1, FORMAT):
            raise ValueError(f"a manifest of format {read['format']}, expected 1 or {FORMAT}")
        examples = tuple(Example(*row) for row in read["examples"])
        skipped = tuple(Skipped(**each) for each in read["skipped"])
        known = read.get("report")
        return cls(
            read["id"],
            read["name"],
            tuple(read["labels"]),
            examples,
            skipped,
            Report.from_json(known) if known else Report.of(examples, len(skipped)),
            read["created_at"],
            read.get("parent"),
        )


def digest(examples: Iterable[Example]) -> str:
    """The content's name: what the pictures are and what they are called, whatever their files were called."""
    rows = sorted((example.split, example.label, example.sha256) for example in examples)
    return hashlib.sha256(json.dumps(["lensrack dataset 1", rows], separators=(",", ":")).encode()).hexdigest()


def check(examples: Sequence[Example], skipped: Sequence[Skipped]) -> None:
    """What training needs: two classes, each with two pictures to train on."""
    labels = sorted({example.label for example in examples}, key=natural)
    train = Counter(example.label for example in examples if example.split == "train")
    if not examples:
        raise bad("no readable picture with a label; expected class folders, a table or labelled rows", skipped)
    if len(labels) == 1:
        raise bad(f"expected at least two classes, got one: {labels[0]!r}", skipped)
    for label in labels:
        if label not in train:
            where = ", ".join(sorted({example.split for example in examples if example.label == label}))
            raise bad(f"class {label!r} has pictures in {where} and none in train", skipped)
        if train[label] < MIN_TRAIN:
            raise bad(f"class {label!r} has {train[label]} training picture; expected at least {MIN_TRAIN}", skipped)


def bad(detail: str, skipped: Sequence[Skipped] = ()) -> BadRequest:
    """The problem carries the first of the skipped files, since they are often the reason."""
    first = [asdict(each) for each in skipped[:20]]
    if skipped:
        detail += f"; files skipped: {len(skipped)}, the first: {skipped[0].name}: {skipped[0].reason}"
    return BadRequest(detail, code="bad_dataset", skipped=first)
