"""Split and label from folders, the digest of a dataset, and datasets that cannot be trained on."""

from __future__ import annotations

import random

import pytest

from server.datasets.dataset import Dataset, Example, Skipped, digest, natural
from server.datasets.formats.layout import places
from server.datasets.label import known_label, label_of, similar_labels
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
        ("test", "test"), ("testing", "test"), ("dev", "val"), ("Evaluation", "test"), ("training_set", "train"),
        ("Test Images", "test"), ("TrainingSet", "train"), ("VAL-DIR", "val"), ("test2017", "test"),
        ("trainset", "train"), ("images_test", "test"), ("train_data", "train"),
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


BOTH = ("cat", "dog")
WRAPPED: dict[str, list[tuple[str, str | None]]] = {  # a folder, and the split of the classes in it
    "two wrappers": [("download/pets", "train")],
    "doubled splits": [("seg_train/seg_train", "train"), ("seg_test/seg_test", "test"), ("seg_pred/seg_pred", None)],
    "doubled, in a wrapper": [("a/training_set/training_set", "train"), ("a/test_set/test_set", "test")],
    "another name in one split": [("asl_train/asl_alphabet", "train"), ("asl_test", "test")],
    "directories": [("train_dir", "train"), ("val_dir", "val")],
    "images around splits": [("images/train", "train"), ("images/val", "val")],
    "images in splits": [("Training/images", "train"), ("Testing/images", "test")],
    "a whole copy inside": [("x/train", "train"), ("x/test", "test"), ("x/x/train", None)],
    "one split, doubled": [("seg_train/seg_train", "train")],
}


@pytest.mark.parametrize("folders", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_and_splits_are_not_taken_for_classes(folders: list[tuple[str, str | None]]) -> None:
    result = placed(*(f"{folder}/{label}/1.jpg" for folder, _ in folders for label in BOTH))
    assert result == {
        f"{folder}/{label}/1.jpg": (split, label) if split else None for folder, split in folders for label in BOTH
    }


def test_flat_pictures_in_a_doubled_split_have_no_label() -> None:
    paths = "train/train/A/1.jpg", "train/train/B/2.jpg", "test/test/A_test.jpg", "seg/1.jpg"
    assert [*placed(*paths).values()] == [("train", "A"), ("train", "B"), None, None]
    assert [*placed("train/1.jpg", "train/2.jpg", "test1/3.jpg").values()] == [None] * 3


def test_splits_inside_classes() -> None:
    assert [*placed("cat/train/1.jpg", "dog/train/1.jpg", "cat/test/2.jpg").values()] == [
        ("train", "cat"), ("train", "dog"), ("test", "cat"),
    ]  # fmt: skip


def test_classes_with_the_name_of_a_split_in_theirs() -> None:
    for first, second in (("bullet_train/day", "taxi/night"), ("train", "bus"), ("n1/images", "n2/images")):
        labels = [("train", path.partition("/")[0]) for path in (first, second)]
        assert [*placed(f"{first}/1.jpg", f"{second}/2.jpg").values()] == labels


@pytest.mark.parametrize("outer", [("fold1", "fold2"), ("set/color", "set/grayscale"), ("train/a", "train/b")])
def test_the_same_folders_inside_each_other_are_refused(outer: tuple[str, str]) -> None:
    with pytest.raises(BadRequest) as caught:
        placed(*(f"{folder}/{label}/{number}.jpg" for folder in outer for label in BOTH for number in range(9)))
    names = ", ".join(repr(folder.rpartition("/")[2]) for folder in outer)
    assert f"found the folders 'cat', 'dog' inside each of {names}" in caught.value.detail
    assert "join the folders of the same name" in caught.value.detail


def test_a_folder_above_several_sets_is_refused() -> None:
    with pytest.raises(BadRequest, match="found the split folders 'test', 'train' inside each of 'cup', 'screw'"):
        placed(*(f"{top}/{split}/good/1.jpg" for top in ("cup", "screw") for split in ("train", "test")))


# --- labels -----------------------------------------------------------------------------------------------------------


KEPT = [
    "red  car", " a ", "Ka\u0308fer", "می\u200cخواهم", "👨\u200d👩\u200d👧", "so\u00adft", "🏴\U000e0067\U000e007f",
    "x" * 200,
]  # fmt: skip


@pytest.mark.parametrize("label", KEPT)
def test_labels_stay_as_they_are(label: str) -> None:
    assert label_of(label) == label
    assert placed(f"{label}/1.jpg", "other/1.jpg")[f"{label}/1.jpg"] == ("train", label)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("x" * 201, "at most 200"), (" \u200b ", "without any letter"), ("", "without any letter"),
        ("a\tb", r"U\+0009"), ("a\x1b[31m", r"U\+001B"), ("a\u2028", r"U\+2028"), ("\ud800b", r"U\+D800"),
    ],
)  # fmt: skip
def test_what_no_task_could_hold_is_refused(label: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        label_of(label)
    assert caught.value.code == "bad_dataset"


def test_a_known_label_is_the_same_or_the_only_one_that_looks_the_same() -> None:
    known = ["red  car", "red car", "c ", "Ka\u0308fer", "cat"]
    for meant, label in {"red  car": "red  car", "red car": "red car", "c": "c ", "K\u00e4fer": "Ka\u0308fer"}.items():
        assert known_label(meant, known) == label
    for unknown in ("red   car", "Cat", "d"):
        assert known_label(unknown, known) is None
    assert similar_labels(["Cat", "cat ", "dog", "ca\u200bt"]) == [["Cat", "cat ", "ca\u200bt"]]


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
