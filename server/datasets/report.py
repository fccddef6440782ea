"""The report on a dataset: sizes, formats, duplicates, and warnings of what would mislead training or evaluation.

A warning is a short sentence and a stable code that programs may act on.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Final, Self

from .example import SPLITS, Example, natural
from .label import similar_labels

MAX_LISTED: Final = 50  # repeated pictures that are listed by name
MAX_NAMES: Final = 10  # names listed for one picture
FEW: Final = 10  # training pictures of a class, below which its accuracy is left to chance
IMBALANCE: Final = 10  # times as many training pictures in the largest class as in the smallest
SMALL_SIDE: Final = 32  # pixels
MANY_SKIPPED: Final = 0.1  # of all files


@dataclass(frozen=True, slots=True)
class Spread:
    min: float
    median: float
    max: float


@dataclass(frozen=True, slots=True)
class Copies:
    """One picture under several names: `count` of all names, and the first of them as `split/label: path`."""

    sha256: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Files with the same bytes. `repeated`: copies beyond the first, by split. `leaked`, `contradictory`: distinct
    pictures in several splits, and under several labels, the first of which are listed."""

    repeated: dict[str, int]
    leaked: int
    contradictory: int
    leaks: tuple[Copies, ...]
    contradictions: tuple[Copies, ...]


@dataclass(frozen=True, slots=True)
class WarningText:
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """`width` and `height` are in pixels, `bytes` of a file; `modes` and `formats` map to numbers of pictures."""

    width: Spread
    height: Spread
    bytes: Spread
    modes: dict[str, int]
    formats: dict[str, int]
    duplicates: Duplicates
    warnings: tuple[WarningText, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], skipped: int) -> Self:
        """The report on one example or more; `skipped` is the number of files that were left out."""
        duplicates = _duplicates(examples)
        return cls(
            _spread([e.width for e in examples]),
            _spread([e.height for e in examples]),
            _spread([e.bytes for e in examples]),
            _frequencies(e.mode for e in examples),
            _frequencies(e.format for e in examples),
            duplicates,
            tuple(_warnings(examples, duplicates, skipped)),
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        width, height, size = (Spread(**fields[name]) for name in ("width", "height", "bytes"))
        copies = fields["duplicates"]
        leaks, contradictions = (
            tuple(Copies(row["sha256"], row["count"], tuple(row["names"])) for row in copies[name])
            for name in ("leaks", "contradictions")
        )
        duplicates = Duplicates(**{**copies, "leaks": leaks, "contradictions": contradictions})
        warnings = tuple(WarningText(**row) for row in fields["warnings"])
        return cls(width, height, size, fields["modes"], fields["formats"], duplicates, warnings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _spread(numbers: Sequence[int]) -> Spread:
    return Spread(min(numbers), statistics.median(numbers), max(numbers))


def _frequencies(names: Iterator[str]) -> dict[str, int]:
    """name → count, the most frequent first; empty names (unknown) are left out."""
    counts = Counter(names)
    del counts[""]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- the same bytes ---------------------------------------------------------------------------------------------------


def _duplicates(examples: Sequence[Example]) -> Duplicates:
    groups = _groups(examples)
    leaks = [group for group in groups if len({e.split for e in group}) > 1]
    contradictions = [group for group in groups if len({e.label for e in group}) > 1]
    repeated: Counter[str] = Counter()
    for group in groups:
        repeated.update({split: count - 1 for split, count in Counter(e.split for e in group).items()})
    return Duplicates(
        {split: repeated[split] for split in SPLITS if repeated[split]},
        len(leaks),
        len(contradictions),
        tuple(_copies(group) for group in leaks[:MAX_LISTED]),
        tuple(_copies(group) for group in contradictions[:MAX_LISTED]),
    )


def _groups(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each picture that occurs more than once, in the order of the examples."""
    times = Counter(e.sha256 for e in examples)
    groups: dict[str, list[Example]] = defaultdict(list)
    for e in examples:
        if times[e.sha256] > 1:
            groups[e.sha256].append(e)
    return list(groups.values())


def _copies(group: Sequence[Example]) -> Copies:
    names = tuple(f"{e.split}/{e.label}: {e.name}" for e in group[:MAX_NAMES])
    return Copies(group[0].sha256, len(group), names)


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warnings(examples: Sequence[Example], duplicates: Duplicates, skipped: int) -> Iterator[WarningText]:
    yield from _leakage(examples)
    if count := duplicates.contradictory:
        yield WarningText("contradictory_labels", f"{_pictures(count)} under several labels: all but one must be wrong")
    if count := sum(duplicates.repeated.values()):
        yield WarningText("duplicates", f"{_pictures(count)} the exact copy of another in the same split")
    yield from _imbalance(Counter(e.label for e in examples if e.split == "train"))
    yield from _absent(examples)
    if alike := similar_labels(sorted({e.label for e in examples}, key=natural)):
        names = "; ".join(" and ".join(map(ascii, group)) for group in alike[:5]) + ("; …" if len(alike) > 5 else "")
        yield WarningText("similar_labels", f"labels that look alike are different classes: {names}")
    if nested := _nested(examples):
        text = "no picture directly in their folder but several folders, whose names are not used"
        yield WarningText("nested_folders", f"{_classes(nested)} {text}")
    if small := sum(min(e.width, e.height) < SMALL_SIDE for e in examples):
        why = "enlarged for the backbone, they are blurred"
        yield WarningText("small_images", f"{_pictures(small)} smaller than {SMALL_SIDE} pixels a side: {why}")
    if skipped > MANY_SKIPPED * (skipped + len(examples)):
        yield WarningText("many_skipped", f"{skipped:,} of {skipped + len(examples):,} files were left out")


def _leakage(examples: Sequence[Example]) -> Iterator[WarningText]:
    inside = {split: {e.sha256 for e in examples if e.split == split} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        if count := len(inside[first] & inside[second]):
            text = f"{_pictures(count)} in both {first} and {second}: accuracy on {second} will be too high"
            yield WarningText("leakage", text)


def _imbalance(train: Mapping[str, int]) -> Iterator[WarningText]:
    most, least = max(train, key=lambda label: train[label]), min(train, key=lambda label: train[label])
    if train[most] > IMBALANCE * train[least]:
        text = f"class {most!r} has {train[most]:,} training pictures and class {least!r} has {train[least]:,}"
        yield WarningText("imbalance", f"{text}: accuracy says little about the rare classes")
    few = sorted((label for label, count in train.items() if count < FEW), key=natural)
    if few:
        yield WarningText("few_images", f"{_classes(few)} fewer than {FEW} training pictures")


def _absent(examples: Sequence[Example]) -> Iterator[WarningText]:
    """Splits that lack a class."""
    labels = {e.label for e in examples}
    for split in SPLITS:
        there = {e.label for e in examples if e.split == split}
        if there and there != labels:
            yield WarningText(
                "absent_classes", f"{_classes(sorted(labels - there, key=natural))} no picture in {split}"
            )


def _nested(examples: Sequence[Example]) -> list[str]:
    """The classes whose pictures all lie in folders, at least two, below the folder of the class's name."""
    inside: dict[str, set[str]] = defaultdict(set)
    for e in examples:
        folders = e.name.split("/")[:-1]
        below = folders[folders.index(e.label) + 1 :] if e.label in folders else []
        inside[e.label].add(below[0] if below else "")
    return sorted((label for label, names in inside.items() if len(names) > 1 and "" not in names), key=natural)


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count:,} pictures are"


def _classes(labels: Sequence[str]) -> str:
    names = ", ".join(repr(label) for label in labels[:5]) + (", …" if len(labels) > 5 else "")
    return f"class {names} has" if len(labels) == 1 else f"{len(labels):,} classes ({names}) have"
