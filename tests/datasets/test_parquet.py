"""Parquet files of labelled pictures: as Hugging Face writes them, as others do, cut off. Attacks: tests/security."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from server.datasets.dataset import Dataset
from server.datasets.dataset_store import DatasetStore
from server.datasets.formats.parquet_members import split_of_file
from server.errors import BadRequest
from tests.datasets.test_dataset_store import EMPTY, LIMITS, picture, tree, write_zip
from tests.datasets.test_manifest import FOLDERS, LABELS, PICTURES, WRITERS

DATA = [picture(number) for number in range(6)]
NUMBERS = [0, 1] * 3
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
}


def images(data: Sequence[bytes | None] = DATA) -> pa.Array:
    return pa.array([{"bytes": one, "path": f"{number}.png"} for number, one in enumerate(data)], IMAGE)


def hugging_face(columns: dict[str, Any], features: dict[str, Any]) -> pa.Table:
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


TABLE = hugging_face({"image": images(), "label": pa.array(NUMBERS, pa.int64())}, FEATURES)


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out, **options)
    return bytes(out.getvalue())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, **LIMITS)


def ingest(store: DatasetStore, tmp_path: Path, data: bytes) -> Dataset:
    (tmp_path / "upload").write_bytes(data)
    return store.ingest(tmp_path / "upload")


def refusal(root: Path, tmp_path: Path, data: bytes, code: str = "bad_dataset") -> str:
    with pytest.raises(BadRequest) as caught:
        ingest(DatasetStore(root, **LIMITS), tmp_path, data)
    assert caught.value.code == code, caught.value.detail
    assert tree(root) == EMPTY
    assert str(tmp_path) not in caught.value.detail
    return caught.value.detail


WRITTEN: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "zstd": {"compression": "zstd"},
    "gzip": {"compression": "gzip"},
    "unpacked": {"compression": "none"},
    "no dictionary": {"use_dictionary": False},
    "pages of version 2": {"data_page_version": "2.0", "version": "2.6"},
    "small row groups and pages": {"row_group_size": 2, "data_page_size": 10, "write_batch_size": 1},
    "checksums and an index": {"write_page_checksum": True, "write_page_index": True},
    "lengths first": {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
    "no Arrow schema": {"store_schema": False},
}


@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_every_way_of_writing_gives_the_same_dataset(
    store: DatasetStore, tmp_path: Path, options: dict[str, Any]
) -> None:
    same = store.ingest(write_zip(tmp_path / "a.zip", FOLDERS))
    dataset = ingest(store, tmp_path, parquet(TABLE, **options))
    if "store_schema" in options:  # and so without the names that Hugging Face keeps there
        assert dataset.labels in (("0", "1"), ("cat", "dog"))
    else:
        assert dataset == same
    assert {store.read(one.sha256) for one in dataset.examples} == set(DATA)


COLUMNS: dict[str, pa.Table] = {
    "text labels": pa.table({"image": images(), "label": LABELS}),
    "categories": pa.table({"image": images(), "label": pa.array(LABELS).dictionary_encode()}),
    "plain binary": pa.table({"img": pa.array(DATA, pa.binary()), "class": LABELS}),
    "large binary": pa.table({"picture": pa.array(DATA, pa.large_binary()), "target": LABELS}),
    "bytes only": pa.table({"image": pa.array([{"bytes": one} for one in DATA]), "labels": LABELS}),
    "more columns": pa.table(
        {"id": range(6), "note": ["x"] * 6, "boxes": [[[1.5]]] * 6, "image": images(), "label": LABELS}
    ),
    "other names": hugging_face(
        {"photo": images(), "mask": images(), "kind": pa.array(NUMBERS, pa.int32()), "age": NUMBERS},
        {"photo": FEATURES["image"], "kind": FEATURES["label"], "mask": {"_type": "Value"}},
    ),
    "two ClassLabels": hugging_face(
        {"image": images(), "coarse": NUMBERS[::-1], "label": NUMBERS},
        {**FEATURES, "coarse": FEATURES["label"]},
    ),
    "text in the place of a ClassLabel": hugging_face(
        {"image": images(), "label": LABELS}, {"image": {"_type": "Image"}, "label": {"_type": "Value"}}
    ),
    "features that are nonsense": pa.table({"image": images(), "label": LABELS}).replace_schema_metadata(
        {"huggingface": "[" * 5000}
    ),
}


@pytest.mark.parametrize("table", COLUMNS.values(), ids=COLUMNS)
def test_columns_are_found(store: DatasetStore, tmp_path: Path, table: pa.Table) -> None:
    dataset = ingest(store, tmp_path, parquet(table))
    assert dataset.labels == ("cat", "dog")
    assert dataset.id == store.ingest(write_zip(tmp_path / "a.zip", FOLDERS)).id


def test_numbers_without_names_are_called_as_they_are_written(store: DatasetStore, tmp_path: Path) -> None:
    table = pa.table({"image": images(), "label": pa.array([7, 12] * 3, pa.uint8())})
    assert ingest(store, tmp_path, parquet(table)).labels == ("7", "12")


def test_rows_without_a_picture_or_a_label_are_skipped_and_no_path_is_followed(
    store: DatasetStore, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(77))
    rows = [*({"bytes": one, "path": None} for one in DATA), {"bytes": None, "path": str(secret)}, None,
            {"bytes": b"no picture"}, {"bytes": picture(8), "path": "8.png"}, {"bytes": picture(9)}]  # fmt: skip
    labels = [*NUMBERS, 0, 0, 0, -1, None]
    table = hugging_face({"image": pa.array(rows, IMAGE), "label": pa.array(labels, pa.int64())}, FEATURES)
    dataset = ingest(store, tmp_path, parquet(table))
    assert dataset.images == 6
    reasons = {one.name: one.reason for one in dataset.skipped}
    assert "expected an image" in reasons.pop("rows/8")
    assert reasons == {
        "rows/6": "its row has no picture bytes; paths are never followed",
        "rows/7": "its row has no picture bytes; paths are never followed",
        "rows/9": "its row has no label",
        "rows/10": "its row has no label",
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/test-00000-of-00001-0a1b2c.parquet", "test"),
        ("default/validation/0000.parquet", "val"),
        ("0000.parquet", "train"),
        ("cifar10-test.parquet", "test"),
        ("test/train.parquet", "train"),
        ("contest/attest.parquet", "train"),
    ],
)
def test_splits_by_the_name(name: str, split: str) -> None:
    assert split_of_file(tuple(name.split("/"))) == split


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_shards_inside_an_archive(store: DatasetStore, tmp_path: Path, write: Any) -> None:
    other = TABLE.set_column(0, "image", images([picture(100 + number) for number in range(6)]))
    shards = {
        "README.md": b"# Pets",
        "data/train-00000-of-00002.parquet": parquet(TABLE.slice(0, 3)),
        "data/train-00001-of-00002.parquet": parquet(TABLE.slice(3)),
        "data/test-00000-of-00001.parquet": parquet(other),
    }
    dataset = store.ingest(write(tmp_path / "a", shards))
    assert dataset.splits == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}
    assert "data/train-00001-of-00002.parquet/2" in {one.name for one in dataset.examples}
    assert [one.name for one in dataset.skipped] == ["README.md"]


def test_many_rows_in_many_batches(store: DatasetStore, tmp_path: Path) -> None:
    """Pictures as large as pages, so that a batch has few of them."""
    data = [picture(number, (40, 30)) for number in range(700)]
    table = pa.table({"image": images(data), "label": [str(number % 7) for number in range(700)]})
    dataset = ingest(store, tmp_path, parquet(table, row_group_size=300, data_page_size=1000))
    assert dataset.images == 700
    by_name = {one.name: one for one in dataset.examples}
    for number in (0, 255, 256, 299, 300, 699):
        assert store.read(by_name[f"rows/{number}"].sha256) == data[number]
        assert by_name[f"rows/{number}"].label == str(number % 7)


def test_a_label_column_chosen_by_name(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    columns = {"image": images(), "label": NUMBERS[::-1], "fine": NUMBERS, "score": [0.5] * 6}
    names = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    (tmp_path / "a").write_bytes(parquet(hugging_face(columns, {**FEATURES, "fine": names})))
    for column in ("score", "kind"):
        with pytest.raises(BadRequest, match=rf"\(integers or text called {column}\), found image"):
            store.ingest(tmp_path / "a", label_column=column)
    assert tree(root) == EMPTY
    dataset = store.ingest(tmp_path / "a", label_column="fine")
    assert dataset.id == store.ingest(write_zip(tmp_path / "b.zip", FOLDERS)).id
    write_zip(tmp_path / "c.zip", {"train.parquet": (tmp_path / "a").read_bytes()})
    assert store.ingest(tmp_path / "c.zip", label_column="fine").id == dataset.id


TABLES: dict[str, pa.Table] = {
    "text": pa.table({"file_name": list(PICTURES), "label": LABELS, "note": [0.5] * 6}),
    "numbers with names": hugging_face({"file_name": list(PICTURES), "label": NUMBERS}, {"label": FEATURES["label"]}),
    "a split": pa.table({"id": [str(number) for number in range(6)], "breed": LABELS, "split": ["train"] * 6}),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_of_labels_beside_pictures(store: DatasetStore, tmp_path: Path, table: pa.Table) -> None:
    files = {**PICTURES, "metadata.parquet": parquet(table)}
    dataset = store.ingest(write_zip(tmp_path / "a.zip", files))
    assert (dataset.splits, dataset.skipped) == ({"train": {"cat": 3, "dog": 3}}, ())


REFUSED: dict[str, tuple[pa.Table, str]] = {
    "no image": (
        pa.table({"pixels": [[1, 2]] * 6, "label": LABELS}),
        "expected one column of images (struct of bytes and path, or binary), found pixels: list<element: int64>",
    ),
    "no label": (pa.table({"image": images(), "caption": LABELS}), "expected one column of labels"),
    "two images": (pa.table({"left": images(), "right": images(), "label": LABELS}), "found left: struct<bytes"),
    "two labels": (
        hugging_face({"image": images(), "a": NUMBERS, "b": NUMBERS},
                     {**FEATURES, "a": FEATURES["label"], "b": FEATURES["label"]}),
        "a ClassLabel or called label), found image: struct<bytes: binary, path: string>, a: int64, b: int64",
    ),
    "several labels a picture": (pa.table({"image": images(), "label": [[1, 2]] * 6}), "label: list<element: int64>"),
    "fractions as labels": (pa.table({"image": images(), "label": [0.5] * 6}), "label: double"),
    "pictures as text": (pa.table({"image": ["aGVsbG8="] * 6, "label": LABELS}), "image: string"),
    "lists of pictures": (pa.table({"image": [[one] for one in DATA], "label": LABELS}), "image: list<element: bin"),
    "a label without a name": (TABLE.set_column(1, "label", pa.array([0, 2] * 3)), "numbers from 0 to 1, which have"),
    "names that are none": (
        hugging_face({"image": images(), "label": NUMBERS}, {**FEATURES, "label": {"_type": "ClassLabel", "names": 3}}),
        "expected a ClassLabel with a list of names, got 3",
    ),
    "a column twice": (
        pa.Table.from_arrays([images(), images(), pa.array(LABELS)], ["image", "image", "label"]),
        "expected one column of images",
    ),
    "a long label": (pa.table({"image": images(), "label": ["x" * 201] * 6}), "at most 200 are allowed"),
    "no rows": (TABLE.slice(0, 0), "no readable picture"),
    "one class": (TABLE.set_column(1, "label", pa.array([0] * 6)), "at least two classes, got one: 'cat'"),
    "one picture of a class": (TABLE.slice(0, 4).slice(0, 3), "class 'dog' has 1 training picture"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_labelled_set_is_refused(root: Path, tmp_path: Path, table: pa.Table, says: str) -> None:
    assert says in refusal(root, tmp_path, parquet(table))


def test_a_parquet_file_cut_anywhere_is_refused(root: Path, tmp_path: Path) -> None:
    whole = parquet(TABLE)
    for end in (4, 11, 12, 300, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        assert "damaged or truncated" in refusal(root, tmp_path, whole[:end], "bad_archive")
