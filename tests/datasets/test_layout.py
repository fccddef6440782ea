"""Split and label from folders, the digest of a dataset, and datasets that cannot be trained on."""

from __future__ import annotations

import random

import pytest

from server.datasets.dataset import Dataset, Example, Skipped, digest, natural
from server.datasets.formats.layout import label_of, places
from server.errors import BadRequest


def placed(*paths: str) -> dict[str, object]:
    result = places([tuple(path.split("/")) for path in paths])
    return {path: place if isinstance(place, tuple) else None for path, place in zip(paths, result, strict=True)}


def test_class_folders() -> None:
    assert placed("cat/1.jpg", "dog/deep/er/2.jpg", "stray.jpg") == {
        "cat/1.jpg": ("train", "cat"),
        "dog/deep/er/2.jpg": ("train", "dog"),
        "stray.jpg": None,
    }


@pytest.mark.parametrize("wrapper", ["", "trashnet/", "test/", "training/"])
def test_split_folders_with_and_without_a_wrapper(wrapper: str) -> None:
    assert placed(*(wrapper + path for path in ("train/cat/1.jpg", "Valid/cat/2.jpg", "TESTING/cat/3.jpg"))) == {
        f"{wrapper}train/cat/1.jpg": ("train", "cat"),
        f"{wrapper}Valid/cat/2.jpg": ("val", "cat"),
        f"{wrapper}TESTING/cat/3.jpg": ("test", "cat"),
    }


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"), ("training", "train"), ("val", "val"), ("valid", "val"), ("validation", "val"),
        ("test", "test"), ("testing", "test"),
    ],
)  # fmt: skip
def test_split_aliases(folder: str, split: str) -> None:
    assert placed(f"{folder}/cat/1.jpg", "train/dog/1.jpg")[f"{folder}/cat/1.jpg"] == (split, "cat")


def test_one_folder_of_class_folders_is_a_wrapper() -> None:
    assert placed("pets/cat/1.jpg", "pets/dog/2.jpg", "pets/preview.jpg", "top.jpg") == {
        "pets/cat/1.jpg": ("train", "cat"),
        "pets/dog/2.jpg": ("train", "dog"),
        "pets/preview.jpg": None,
        "top.jpg": None,
    }


def test_a_single_split_folder_is_a_split() -> None:
    assert placed("train/cat/1.jpg", "train/dog/1.jpg")["train/dog/1.jpg"] == ("train", "dog")


def test_a_class_may_be_called_valid() -> None:
    assert placed("valid/1.jpg", "invalid/2.jpg") == {
        "valid/1.jpg": ("train", "valid"),
        "invalid/2.jpg": ("train", "invalid"),
    }


def test_pictures_beside_the_split_folders_have_no_place() -> None:
    result = placed("train/cat/1.jpg", "train/loose.jpg", "extra/dog/2.jpg", "loose.jpg")
    assert [path for path, place in result.items() if place is None] == [
        "train/loose.jpg", "extra/dog/2.jpg", "loose.jpg",
    ]  # fmt: skip


def test_labels_are_cleaned() -> None:
    assert label_of("  a\tb \u00a0c\x1b[31m ") == "a b c [31m"
    assert label_of("Ka\u0308fer") == "Käfer"
    assert label_of("x" * 200) == "x" * 200
    for folder in ("x" * 201, " \u200b "):
        with pytest.raises(BadRequest) as caught:
            label_of(folder)
        assert caught.value.code == "bad_dataset"


def test_natural_order() -> None:
    assert sorted(["10", "9", "0", "01", "1", "b", "a10", "a9", ""], key=natural) == [
        "", "0", "01", "1", "9", "10", "a9", "a10", "b",
    ]  # fmt: skip


# --- datasets ---------------------------------------------------------------------------------------------------------


def example(split: str, label: str, number: int, name: str = "") -> Example:
    return Example(split, label, name or f"{label}/{number}.jpg", f"{number:064x}", 10, 4, 3)  # type: ignore[arg-type]


GOOD = [example("train", label, number) for label in ("2", "10") for number in (1, 2)]


def test_the_id_is_the_content_whatever_the_files_are_called() -> None:
    renamed = [Example(one.split, one.label, f"{index}.png", one.sha256, 10, 4, 3) for index, one in enumerate(GOOD)]
    random.Random(1).shuffle(renamed)
    assert digest(renamed) == digest(GOOD)
    others = [
        GOOD[:-1],
        [*GOOD, GOOD[0]],
        [*GOOD[:-1], example("val", "10", 2)],
        [*GOOD[:-1], example("train", "11", 2)],
        [*GOOD[:-1], example("train", "10", 3)],
    ]
    assert len({digest(GOOD), *map(digest, others)}) == 6


def test_a_dataset_knows_its_counts_and_survives_its_manifest() -> None:
    dataset = Dataset.of([*GOOD, example("test", "2", 5)], [Skipped("x.txt", "no picture")], name="é", created_at=1.5)
    assert dataset.labels == ("2", "10")
    assert (dataset.images, dataset.bytes) == (5, 50)
    assert dataset.splits == {"train": {"2": 2, "10": 2}, "test": {"2": 1, "10": 0}}
    assert Dataset.from_json(dataset.to_json()) == dataset


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ([], "no readable picture"),
        (GOOD[:2], "at least two classes, got one: '2'"),
        (GOOD[:3], "class '10' has 1 training picture"),
        ([*GOOD, example("test", "rare", 9)], "class 'rare' has pictures in test and none in train"),
        ([example("test", one.label, index) for index, one in enumerate(GOOD)], "none in train"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(examples: list[Example], says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Dataset.of(examples, [Skipped("notes.txt", "not an image")], name="", created_at=0.0)
    assert caught.value.code == "bad_dataset"
    assert says in caught.value.detail
    assert "files skipped: 1, the first: notes.txt: not an image" in caught.value.detail
    assert caught.value.extra["skipped"] == [{"name": "notes.txt", "reason": "not an image"}]
