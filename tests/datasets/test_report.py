"""A dataset's report: its counts, its warnings, and reports for old manifests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from lensrack import wire
from server.api.routes.datasets import to_wire
from server.datasets.dataset import Dataset, Example
from server.datasets.dataset_store import DatasetStore
from server.datasets.formats.image_kind import kind
from server.datasets.report import MAX_LISTED, MAX_NAMES, Copies, Report, Spread
from tests.datasets.test_dataset_store import LIMITS, picture, write_zip


def example(label: str, number: int, split: str = "train", **fields: object) -> Example:
    known = {"name": f"{label}/{number}.jpg", "sha256": f"{number:064x}", "bytes": 10, "width": 64, "height": 48}
    return Example(split, label, **{**known, "format": "jpeg", "mode": "RGB", **fields})  # type: ignore[arg-type]


def many(label: str, count: int, start: int, split: str = "train") -> list[Example]:
    return [example(label, start + number, split) for number in range(count)]


SOUND = many("cat", 12, 0) + many("dog", 12, 100) + many("cat", 2, 200, "test") + many("dog", 2, 300, "test")


def codes(examples: list[Example], skipped: int = 0) -> list[str]:
    return [warning.code for warning in Report.of(examples, skipped).warnings]


def texts(examples: list[Example], skipped: int = 0) -> str:
    return "\n".join(warning.text for warning in Report.of(examples, skipped).warnings)


def test_a_sound_dataset_has_no_warning() -> None:
    report = Report.of(SOUND, skipped=3)
    assert report.warnings == ()
    assert report.duplicates.repeated == {}
    assert (report.duplicates.leaked, report.duplicates.contradictory) == (0, 0)


def test_sizes_modes_and_formats() -> None:
    odd = example("cat", 900, width=10, height=2000, bytes=5, mode="L", format="png")
    report = Report.of([*SOUND, odd, example("cat", 901, width=100, mode="", format="")], 0)
    assert report.width == Spread(10, 64, 100)
    assert report.height == Spread(48, 48, 2000)
    assert report.bytes == Spread(5, 10, 10)
    assert list(report.modes.items()) == [("RGB", 28), ("L", 1)]
    assert report.formats == {"jpeg": 28, "png": 1}


def test_copies_across_splits_are_leakage_with_their_names() -> None:
    leaked = [example("cat", 3, "val", name="val/c.jpg"), example("cat", 3, "test", name="test/c.jpg")]
    report = Report.of([*SOUND, *leaked, *many("dog", 3, 100, "test")], 0)
    assert report.duplicates.leaked == 4
    names = ("train/cat: cat/3.jpg", "val/cat: val/c.jpg", "test/cat: test/c.jpg")
    assert report.duplicates.leaks[0] == Copies(f"{3:064x}", 3, names)
    leaks = [warning.text for warning in report.warnings if warning.code == "leakage"]
    assert leaks == [
        "1 picture is in both train and val: accuracy on val will be too high",
        "4 pictures are in both train and test: accuracy on test will be too high",
        "1 picture is in both val and test: accuracy on test will be too high",
    ]
    assert report.duplicates.repeated == {}


def test_copies_within_a_split_are_counted_beyond_the_first() -> None:
    report = Report.of([*SOUND, *many("cat", 2, 0), *many("cat", 2, 0), *many("dog", 1, 300, "test")], 0)
    assert report.duplicates.repeated == {"train": 4, "test": 1}
    assert [(each.code, each.text) for each in report.warnings] == [
        ("duplicates", "5 pictures are the exact copy of another in the same split")
    ]


def test_one_picture_under_two_labels() -> None:
    report = Report.of([*SOUND, example("dog", 5, name="dog/5.jpg")], 0)
    assert report.duplicates.contradictory == 1
    assert report.duplicates.contradictions[0].names == ("train/cat: cat/5.jpg", "train/dog: dog/5.jpg")
    assert [each.code for each in report.warnings] == ["contradictory_labels", "duplicates"]


def test_labels_that_look_alike() -> None:
    twins = many("c\u200bat", 12, 400) + many("Dog ", 12, 500)
    assert codes([*SOUND, *twins]) == ["absent_classes", "similar_labels"]
    assert "different classes: 'Dog ' and 'dog'; 'cat' and 'c\\u200bat'" in texts([*SOUND, *twins])


def test_classes_that_hold_folders_only() -> None:
    deep = [example("boat", 600 + n, name=f"a/boat/{'left' if n % 2 else 'right'}/{n}.jpg") for n in range(12)]
    one = [example("car", 700 + n, name=f"car/images/{n}.jpg") for n in range(12)]
    assert codes([*SOUND, *deep, *one]) == ["absent_classes", "nested_folders"]
    assert "class 'boat' has no picture directly in their folder" in texts([*SOUND, *deep, *one])


def test_lists_are_bounded_and_counts_are_not() -> None:
    report = Report.of([*many("cat", 200, 0), *many("cat", 200, 0, "test"), *[example("dog", 1)] * 300], 0)
    assert report.duplicates.leaked == 200
    assert len(report.duplicates.leaks) == MAX_LISTED
    assert report.duplicates.leaks[1].count == 302
    assert len(report.duplicates.leaks[1].names) == MAX_NAMES


@pytest.mark.parametrize(
    ("examples", "skipped", "expected", "says"),
    [
        (many("a", 10, 0) + many("b", 100, 50), 0, [], ""),
        (many("a", 10, 0) + many("b", 101, 50), 0, ["imbalance"], "'b' has 101 training pictures and class 'a' has 10"),
        (many("a", 9, 0) + many("b", 10, 50), 0, ["few_images"], "class 'a' has fewer than 10 training pictures"),
        (
            [one for label in range(8) for one in many(str(label), 2, 10 * label)],
            0,
            ["few_images"],
            "8 classes ('0', '1', '2', '3', '4', …) have fewer than 10",
        ),
        ([*SOUND, example("cat", 950, width=31)], 0, ["small_images"], "1 picture is smaller than 32 pixels a side"),
        ([*SOUND, example("cat", 950, width=32, height=32)], 0, [], ""),
        (SOUND[:-2], 0, ["absent_classes"], "class 'dog' has no picture in test"),
        (SOUND, 4, ["many_skipped"], "4 of 32 files were left out"),
    ],
)
def test_warnings(examples: list[Example], skipped: int, expected: list[str], says: str) -> None:
    assert codes(examples, skipped) == expected
    assert says in texts(examples, skipped)


# --- formats and modes ------------------------------------------------------------------------------------------------


def encoded(mode: str, format_: str, **options: object) -> bytes:
    out = io.BytesIO()
    image = Image.effect_noise((20, 12), 80).convert(mode)
    if mode == "RGBA":
        image.putpixel((0, 0), (9, 9, 9, 0))  # encoders drop an alpha channel that says nothing
    image.save(out, format_, **options)
    return out.getvalue()


KINDS = [
    *[(encoded(mode, "PNG"), ("png", mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[(encoded(mode, "JPEG"), ("jpeg", mode)) for mode in ("L", "RGB", "CMYK")],
    (encoded("RGB", "JPEG", progressive=True, comment=b"\xff\xc0" * 40), ("jpeg", "RGB")),
    *[
        (encoded(mode, "WEBP", lossless=lossless), ("webp", mode))
        for mode in ("RGB", "RGBA")
        for lossless in (False, True)
    ],
    (encoded("RGBA", "BMP"), ("bmp", "RGB")),
    (encoded("RGB", "BMP"), ("bmp", "RGB")),
    (encoded("P", "BMP"), ("bmp", "P")),
]


@pytest.mark.parametrize(("data", "expected"), KINDS)
def test_the_kind_of_a_picture(data: bytes, expected: tuple[str, str]) -> None:
    assert kind(data) == expected


# --- kept and told ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> DatasetStore:
    return DatasetStore(tmp_path / "datasets", **LIMITS)


def test_an_ingested_dataset_is_reported(store: DatasetStore, tmp_path: Path) -> None:
    files = {f"{split}/{label}/{number}.png": picture(1000 * index + number) for split in ("train", "test")
             for index, label in enumerate(("cat", "dog")) for number in range(3)}  # fmt: skip
    grey = encoded("L", "JPEG")
    dataset = store.ingest(write_zip(tmp_path / "a.zip", {**files, "train/cat/grey.jpg": grey}))
    assert dataset.report.modes == {"RGB": 12, "L": 1}
    assert dataset.report.formats == {"png": 12, "jpeg": 1}
    assert dataset.report.width == Spread(20, 24, 24)
    assert dataset.report.duplicates.leaked == 6
    assert store.get(dataset.id) == dataset
    assert [warning.code for warning in dataset.report.warnings] == ["leakage", "few_images", "small_images"]


def test_the_wire_carries_the_report(store: DatasetStore) -> None:
    dataset = Dataset.of([*SOUND, example("dog", 3, "test")], [], name="pets", created_at=1.0)
    message = to_wire(dataset)
    assert wire.Dataset.model_validate_json(message.model_dump_json()) == message
    assert message.report is not None
    assert message.report.warnings[0].code == "leakage"
    assert message.report.duplicates.leaks[0].names == ["train/cat: cat/3.jpg", "test/dog: dog/3.jpg"]
    assert message.report.width.median == 64


def test_a_manifest_of_format_1_still_reads() -> None:
    """As written before reports existed."""
    dataset = Dataset.of(SOUND, [], name="pets", created_at=1.0)
    old = json.loads(dataset.to_json())
    assert old["format"] == 2
    del old["report"], old["parent"]
    old |= {"format": 1, "examples": [row[:7] for row in old["examples"]]}
    read = Dataset.from_json(json.dumps(old))
    assert (read.id, read.labels, read.splits) == (dataset.id, dataset.labels, dataset.splits)
    assert read.report.width == dataset.report.width
    assert read.report.modes == {}
    assert Dataset.from_json(read.to_json()) == read


def test_a_manifest_of_a_later_format_is_refused() -> None:
    later = json.loads(Dataset.of(SOUND, [], name="", created_at=1.0).to_json()) | {"format": 3}
    with pytest.raises(ValueError, match="format 3, expected 1 or 2"):
        Dataset.from_json(json.dumps(later))
