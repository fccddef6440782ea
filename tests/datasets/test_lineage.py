"""Datasets that extend a dataset: the union of the pictures, each once, whatever is deleted in between."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from server.datasets.dataset import Dataset, Example
from server.datasets.dataset_store import DatasetStore
from server.datasets.lineage import drop_rare_labels, merge_examples
from server.errors import BadRequest, NotFound
from tests.datasets.test_dataset_store import EMPTY, LIMITS, blobs, pets, picture, tree, write_zip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, **LIMITS)


@pytest.fixture
def parent(store: DatasetStore, tmp_path: Path) -> Dataset:
    return store.ingest(write_zip(tmp_path / "parent", {f"train/{n}": d for n, d in pets().items()}), name="pets")


def test_the_union_names_its_parent_and_shares_its_pictures(
    store: DatasetStore, parent: Dataset, tmp_path: Path, root: Path
) -> None:
    more = {"cat/9.png": picture(900), "cat/twin.png": picture(900), "owl/0.png": picture(901), "owl/1.png": picture(9)}
    child = store.ingest(write_zip(tmp_path / "more", {**more, **pets()}), parent=parent.id[:8])
    assert (child.parent, child.name) == (parent.id, "pets")
    assert child.splits == {"train": {"cat": 4, "dog": 3, "owl": 2}}
    assert len(blobs(root)) == 9
    assert store.get(child.id) == child
    store.delete(parent.id)
    assert {one.name: store.read(one.sha256) for one in child.examples} == {
        **{f"train/{name}": data for name, data in pets().items()},
        **{name: data for name, data in more.items() if "twin" not in name},
    }
    store.delete(child.id)
    assert tree(root) == EMPTY


def test_the_same_pictures_in_one_archive_or_in_two_are_the_same_dataset(
    store: DatasetStore, parent: Dataset, tmp_path: Path
) -> None:
    whole = store.ingest(write_zip(tmp_path / "whole", pets(count=5)))
    assert whole.parent is None
    assert store.ingest(write_zip(tmp_path / "more", pets(count=5)), parent=parent.id) == whole


def test_nothing_new_is_the_parent_itself(store: DatasetStore, parent: Dataset, tmp_path: Path) -> None:
    assert store.ingest(write_zip(tmp_path / "again", pets(count=2)), parent=parent.id) == parent
    assert store.list() == [parent]


def test_one_class_alone_and_a_single_picture_may_be_added(
    store: DatasetStore, parent: Dataset, tmp_path: Path
) -> None:
    child = store.ingest(write_zip(tmp_path / "one", {"dog/9.png": picture(77)}), parent=parent.id)
    assert child.splits == {"train": {"cat": 3, "dog": 4}}
    with pytest.raises(BadRequest, match="class 'owl' has 1 training picture"):
        store.ingest(write_zip(tmp_path / "lone", {"owl/9.png": picture(78)}), parent=parent.id)


def test_the_last_label_counts_and_the_first_split() -> None:
    def example(split: str, label: str, sha256: str) -> Example:
        return Example(split, label, f"{label}/{sha256}", sha256, 1, 1, 1)  # type: ignore[arg-type]

    parent = [example("train", "cat", "a"), example("test", "cat", "b")]
    added = [example("train", "dog", "b"), example("train", "dog", "c"), example("train", "dog", "c")]
    assert [(one.split, one.label, one.sha256) for one in merge_examples(parent, added, 3)] == [
        ("train", "cat", "a"),
        ("test", "dog", "b"),
        ("train", "dog", "c"),
    ]
    with pytest.raises(BadRequest, match="has 3 pictures; at most 2"):
        merge_examples(parent, added, 2)


def test_a_new_label_without_training_pictures_is_left_out_too() -> None:
    """A correction of a test picture made the whole dataset unusable: a class in test and none in train."""
    examples = [Example("test", "owl", "a", "a", 1, 1, 1), Example("train", "cat", "b", "b", 1, 1, 1)]
    kept, skipped = drop_rare_labels(examples, ["cat"])
    assert [example.label for example in kept] == ["cat"]
    assert [file.reason for file in skipped] == ["the new class 'owl' has 0 pictures in train; expected at least 2"]


def test_an_unknown_parent_and_one_that_goes_meanwhile(
    store: DatasetStore, parent: Dataset, tmp_path: Path, root: Path
) -> None:
    archive = write_zip(tmp_path / "more", {"dog/9.png": picture(77)})
    with pytest.raises(NotFound):
        store.ingest(archive, parent="f" * 64)
    with pytest.raises(NotFound, match="the parent was deleted"):
        store.ingest(archive, parent=parent.id, progress=lambda files, read: store.delete(parent.id))
    assert tree(root) == EMPTY


def test_files_of_their_own_join_a_dataset_and_stay_their_owners(
    store: DatasetStore, parent: Dataset, tmp_path: Path, root: Path
) -> None:
    def said(label: str, data: bytes) -> tuple[Example, Path]:
        sha256 = hashlib.sha256(data).hexdigest()
        (tmp_path / sha256).write_bytes(data)
        return Example("train", label, f"{sha256[:4]}.png", sha256, len(data), 24, 16), tmp_path / sha256

    more = [said("dog", pets()["cat/0.png"]), said("dog", picture(500)), said("owl", picture(501))]
    gone = said("dog", picture(502))
    gone[1].unlink()
    child = store.extend(parent.id, [*more, gone], name="better")
    assert child.splits == {"train": {"cat": 2, "dog": 5}}
    assert (child.parent, child.name) == (parent.id, "better")
    assert [one.name.partition("/")[0] for one in child.skipped] == ["owl"]
    assert {(one.format, one.mode) for one in child.examples} == {("png", "RGB")}, "the report counts them, too"
    assert all(path.exists() for _, path in more)
    (tmp_path / more[1][0].sha256).unlink()
    assert store.read(more[1][0].sha256) == picture(500)
    store.delete(parent.id)
    store.delete(child.id)
    assert tree(root) == EMPTY
