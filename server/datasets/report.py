"""What a person should know about a dataset before they train on it, counted from its examples.

Everything that misleads is a warning: a short sentence, and a stable code that programs may act on.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Final, Self

from .example import SPLITS, Example, natural

MAX_LISTED: Final = 50  # of repeated pictures, as many are listed by name
MAX_NAMES: Final = 10  # of one picture
FEW: Final = 10  # training pictures of a class, below which a lens is a guess
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
    """One picture under several names, the first of them listed: `count` is of all, `names` are split/label: path."""

    sha256: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Exact ones: the same bytes. `repeated` counts, for each split, the pictures beyond the first; `leaked` and
    `contradictory` count different pictures, and the first of these are listed."""

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
        """Of one example at least. `skipped` is how many files became none."""
        duplicates = _duplicates(examples)
        return cls(
            _spread([one.width for one in examples]),
            _spread([one.height for one in examples]),
            _spread([one.bytes for one in examples]),
            _counted(one.mode for one in examples),
            _counted(one.format for one in examples),
            duplicates,
            tuple(_warnings(examples, duplicates, skipped)),
        )

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> Self:
        """Of what `asdict` made and JSON carried."""
        width, height, size = (Spread(**read[name]) for name in ("width", "height", "bytes"))
        found = read["duplicates"]
        leaks, contradictions = (
            tuple(Copies(each["sha256"], each["count"], tuple(each["names"])) for each in found[name])
            for name in ("leaks", "contradictions")
        )
        duplicates = Duplicates(**{**found, "leaks": leaks, "contradictions": contradictions})
        warnings = tuple(WarningText(**each) for each in read["warnings"])
        return cls(width, height, size, read["modes"], read["formats"], duplicates, warnings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _spread(numbers: Sequence[int]) -> Spread:
    return Spread(min(numbers), statistics.median(numbers), max(numbers))


def _counted(names: Iterator[str]) -> dict[str, int]:
    """The most frequent first; empty names are of pictures that nobody looked at."""
    counts = Counter(names)
    del counts[""]
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


# --- the same bytes ---------------------------------------------------------------------------------------------------


def _duplicates(examples: Sequence[Example]) -> Duplicates:
    groups = _groups(examples)
    leaks = [group for group in groups if len({one.split for one in group}) > 1]
    contradictions = [group for group in groups if len({one.label for one in group}) > 1]
    repeated: Counter[str] = Counter()
    for group in groups:
        repeated.update({split: count - 1 for split, count in Counter(one.split for one in group).items()})
    return Duplicates(
        {split: repeated[split] for split in SPLITS if repeated[split]},
        len(leaks),
        len(contradictions),
        tuple(_copies(group) for group in leaks[:MAX_LISTED]),
        tuple(_copies(group) for group in contradictions[:MAX_LISTED]),
    )


def _groups(examples: Sequence[Example]) -> list[list[Example]]:
    """The pictures that come more than once, in the order of the examples."""
    times = Counter(one.sha256 for one in examples)
    groups: dict[str, list[Example]] = defaultdict(list)
    for one in examples:
        if times[one.sha256] > 1:
            groups[one.sha256].append(one)
    return list(groups.values())


def _copies(group: Sequence[Example]) -> Copies:
    names = tuple(f"{one.split}/{one.label}: {one.name}" for one in group[:MAX_NAMES])
    return Copies(group[0].sha256, len(group), names)


# --- warnings ---------------------------------------------------------------------------------------------------------


def _warnings(examples: Sequence[Example], duplicates: Duplicates, skipped: int) -> Iterator[WarningText]:
    yield from _leakage(examples)
    if count := duplicates.contradictory:
        yield WarningText(
            "contradictory_labels", f"{_pictures(count)} under two labels or more: one of them must be wrong"
        )
    if count := sum(duplicates.repeated.values()):
        yield WarningText("duplicates", f"{_pictures(count)} the exact copy of another in the same split")
    yield from _uneven(Counter(one.label for one in examples if one.split == "train"))
    yield from _absent(examples)
    if small := sum(min(one.width, one.height) < SMALL_SIDE for one in examples):
        why = "the backbone sees an enlarged blur"
        yield WarningText("small_images", f"{_pictures(small)} smaller than {SMALL_SIDE} pixels a side: {why}")
    if skipped > MANY_SKIPPED * (skipped + len(examples)):
        yield WarningText("many_skipped", f"{skipped:,} of {skipped + len(examples):,} files were left out")


def _leakage(examples: Sequence[Example]) -> Iterator[WarningText]:
    inside = {split: {one.sha256 for one in examples if one.split == split} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        if count := len(inside[first] & inside[second]):
            text = f"{_pictures(count)} in {first} and in {second} as well: what {second} measures will look too good"
            yield WarningText("leakage", text)


def _uneven(train: Mapping[str, int]) -> Iterator[WarningText]:
    most, least = max(train, key=lambda label: train[label]), min(train, key=lambda label: train[label])
    if train[most] > IMBALANCE * train[least]:
        text = f"class {most!r} has {train[most]:,} training pictures and class {least!r} has {train[least]:,}"
        yield WarningText("imbalance", f"{text}: accuracy says little about the rare classes")
    few = sorted((label for label, count in train.items() if count < FEW), key=natural)
    if few:
        yield WarningText("few_images", f"{_classes(few)} fewer than {FEW} training pictures")


def _absent(examples: Sequence[Example]) -> Iterator[WarningText]:
    """A split that has been cut by hand and does not know every class."""
    labels = {one.label for one in examples}
    for split in SPLITS:
        there = {one.label for one in examples if one.split == split}
        if there and there != labels:
            yield WarningText(
                "absent_classes", f"{_classes(sorted(labels - there, key=natural))} no picture in {split}"
            )


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count:,} pictures are"


def _classes(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label) for label in labels[:5]) + (", …" if len(labels) > 5 else "")
    return f"class {shown} has" if len(labels) == 1 else f"{len(labels):,} classes ({shown}) have"
