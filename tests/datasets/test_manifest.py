"""Archives whose pictures are labelled by a table: CSV or JSON lines, of every common shape."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from server.datasets.dataset import Dataset
from server.datasets.dataset_store import DatasetStore
from server.errors import BadRequest
from tests.datasets.test_dataset_store import EMPTY, LIMITS, picture, tree, write_tgz, write_zip

Files = dict[str, bytes]
PICTURES: Files = {f"images/{number}.png": picture(number) for number in range(6)}
LABELS = ["cat", "dog"] * 3
FOLDERS: Files = {
    f"{label}/{number}.png": picture(number) for number, label in enumerate(LABELS)
}  # the same pictures in class folders
ROWS = "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(LABELS))
TABLE = f"file,label\n{ROWS}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, **LIMITS)


@pytest.fixture
def ingest(store: DatasetStore, tmp_path: Path) -> Callable[[Files], Dataset]:
    return lambda files: store.ingest(write_zip(tmp_path / "a.zip", files))


Ingest = Callable[[Files], Dataset]


def refusal(store: DatasetStore, root: Path, tmp_path: Path, files: Files) -> str:
    with pytest.raises(BadRequest) as caught:
        store.ingest(write_zip(tmp_path / "bad.zip", files))
    assert caught.value.code == "bad_dataset"
    assert tree(root) == EMPTY
    return caught.value.detail


def as_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def as_tar_zst(path: Path, files: Files) -> Path:
    path.write_bytes(zstd.compress(as_tar(path, files).read_bytes()))
    return path


WRITERS = {"zip": write_zip, "tar": as_tar, "tar.gz": write_tgz, "tar.zst": as_tar_zst}


@pytest.mark.parametrize("table_first", [True, False])
def test_the_same_pictures_are_the_same_dataset_whatever_they_come_in(
    store: DatasetStore, tmp_path: Path, table_first: bool
) -> None:
    table = {"labels.csv": TABLE.encode()}
    listed = {**table, **PICTURES} if table_first else {**PICTURES, **table}
    ids = {store.ingest(write(tmp_path / "a", files)).id for write in WRITERS.values() for files in (FOLDERS, listed)}
    assert len(ids) == 1
    assert store.list()[0].splits == {"train": {"cat": 3, "dog": 3}}


def rows(file: str, label: str) -> str:
    return "\n".join(json.dumps({file: f"images/{n}.png", label: name, "more": [1]}) for n, name in enumerate(LABELS))


TABLES = {
    "manifest.csv": TABLE,
    "labels.csv": TABLE.replace("file,", "Filename,").replace("label", "CLASS"),
    "metadata.csv": TABLE.replace("file,", "file_name,"),
    "Labels.CSV": "\ufeff" + TABLE.replace("\n", "\r\n"),
    "pets/labels.csv": TABLE,
    "pets/manifest.csv": TABLE.replace("images/", "./images\\"),
    "pets/metadata.csv": TABLE.replace("images/", "pets/images/"),
    "pets/images/labels.csv": "",
    "manifest.jsonl": rows("path", "label"),
    "metadata.jsonl": rows("image", "class") + "\n\n",
    "labels.jsonl": rows("file", "label"),
}


@pytest.mark.parametrize(("name", "table"), TABLES.items(), ids=TABLES)
def test_every_shape_of_table(ingest: Ingest, name: str, table: str) -> None:
    wrapper = "pets/" if name.startswith("pets/") else ""
    pictures = {wrapper + path: data for path, data in PICTURES.items()}
    if not table:  # a table in a folder of pictures only is none
        pictures = {f"pets/{path}": data for path, data in FOLDERS.items()}
    dataset = ingest({**pictures, name: table.encode()})
    assert dataset.splits == {"train": {"cat": 3, "dog": 3}}
    assert [one.name for one in dataset.skipped] == ([] if table else [name])


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_quotes_and_more_columns(ingest: Ingest, delimiter: str) -> None:
    lines = [["id", "path", "note", "label"]]
    lines += [[str(n), f'"images/{n}.png"', '"a, ""b""\nc"', label] for n, label in enumerate(LABELS)]
    table = "\n".join(delimiter.join(line) for line in lines)
    assert ingest({**PICTURES, "labels.csv": table.encode()}).splits == {"train": {"cat": 3, "dog": 3}}


def test_a_name_without_its_folder_is_found_where_it_is_the_only_one(ingest: Ingest) -> None:
    table = TABLE.replace("images/", "")
    assert ingest({**PICTURES, "labels.csv": table.encode()}).skipped == ()
    twin = {"other/5.png": picture(99)}
    skipped = {one.name: one.reason for one in ingest({**PICTURES, **twin, "labels.csv": table.encode()}).skipped}
    assert skipped == {
        "5.png": "labels.csv lists it, but the archive has no such picture",
        "images/5.png": "not listed in labels.csv",
        "other/5.png": "not listed in labels.csv",
    }


def test_splits_by_column(ingest: Ingest) -> None:
    splits = ["train", "Training", "", "train", "VALIDATION", "test"]
    lines = [f"images/{n}.png,{label},{split}" for n, (label, split) in enumerate(zip(LABELS, splits, strict=True))]
    dataset = ingest({**PICTURES, "labels.csv": "\n".join(["file,label,split", *lines]).encode()})
    assert dataset.splits == {
        "train": {"cat": 2, "dog": 2}, "val": {"cat": 1, "dog": 0}, "test": {"cat": 0, "dog": 1},
    }  # fmt: skip


@pytest.mark.parametrize("wrapper", ["", "pets/"])
def test_splits_by_folders_with_a_table_each_as_in_imagefolder(ingest: Ingest, wrapper: str) -> None:
    files: Files = {}
    for split in ("train", "test"):
        table = "file_name,label\n" + "".join(f"{n}.png,{label}\n" for n, label in enumerate(LABELS))
        files[f"{wrapper}{split}/metadata.csv"] = table.encode()
        shift = 100 if split == "test" else 0
        files |= {f"{wrapper}{split}/{number}.png": picture(shift + number) for number in range(6)}
    assert ingest(files).splits == {"train": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}


def test_splits_by_the_folders_of_the_pictures(ingest: Ingest) -> None:
    files = {f"{'train' if number < 4 else 'test'}/{number}.png": picture(number) for number in range(6)}
    table = "file,label\n" + "".join(f"{path},{LABELS[n]}\n" for n, path in enumerate(files))
    assert ingest({**files, "labels.csv": table.encode()}).splits == {
        "train": {"cat": 2, "dog": 2}, "test": {"cat": 1, "dog": 1},
    }  # fmt: skip


def test_a_table_decides_over_class_folders(ingest: Ingest) -> None:
    table = "file,label\n" + "".join(f"{path},{'odd' if n % 2 else 'even'}\n" for n, path in enumerate(FOLDERS))
    assert ingest({**FOLDERS, "labels.csv": table.encode()}).labels == ("even", "odd")


def test_rows_without_pictures_and_pictures_without_rows(ingest: Ingest) -> None:
    more = "images/gone.png,cat\n../../etc/passwd,cat\n/etc/passwd,dog\nimages/broken.png,dog\nimages/6.png,\n"
    files = {**PICTURES, "images/6.png": picture(6), "images/7.png": picture(7), "images/broken.png": b"no picture"}
    dataset = ingest({**files, "labels.csv": (TABLE + more).encode()})
    skipped = {one.name: one.reason for one in dataset.skipped}
    broken = skipped.pop("images/broken.png")
    assert "expected an image" in broken
    lost = "labels.csv lists it, but the archive has no such picture"
    assert skipped == {
        "images/gone.png": lost,
        "../../etc/passwd": lost,
        "/etc/passwd": lost,
        "images/6.png": "labels.csv has no label for it",
        "images/7.png": "not listed in labels.csv",
    }
    assert dataset.images == 6


def test_a_row_that_comes_twice_and_says_the_same_is_one(ingest: Ingest) -> None:
    assert ingest({**PICTURES, "labels.csv": (TABLE + ROWS).encode()}).images == 6


def test_a_row_without_a_label(ingest: Ingest) -> None:
    none = ["", "NaN", "nan", "<NA>", "NULL", " "]
    files = {f"images/{number}.png": picture(number) for number in range(6 + len(none))}
    more = "".join(f"images/{number}.png,{label}\n" for number, label in enumerate(none, start=6))
    dataset = ingest({**files, "labels.csv": (TABLE + more).encode()})
    assert (dataset.images, {one.reason for one in dataset.skipped}) == (6, {"labels.csv has no label for it"})
    lines = rows("file", "label") + '\n{"file": "images/6.png", "label": NaN}'
    assert ingest({**PICTURES, "images/6.png": picture(6), "labels.jsonl": lines.encode()}).images == 6


def test_labels_in_a_table_stay_as_they_are(ingest: Ingest) -> None:
    for table in (TABLE.replace("cat", "red  cat "), rows("file", "label").replace('"cat"', '"red  cat "')):
        name = "labels.csv" if table.startswith("file") else "labels.jsonl"
        assert ingest({**PICTURES, name: table.encode()}).labels == ("dog", "red  cat ")


WRITTEN = {  # of the picture images/0.PNG, images/1.PNG, …
    "as it is": "images/{n}.PNG",
    "another case": "Images/{n}.png",
    "no extension": "{n}",
    "a folder and no extension": "images/{n}",
    "a path of Linux": "/home/me/pets/images/{n}.PNG",
    "a path of Windows": r"C:\Users\me\{n}.png",
    "a path to an upper folder": "../input/pets/images/{n}.PNG",
    "a longer path": "pets/images/{n}.PNG",
    "a URL": "gs://bucket/{n}.PNG",
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("wrapper", ["", "a/b/"])
def test_names_as_people_and_tools_write_them(ingest: Ingest, written: str, wrapper: str) -> None:
    pictures = {f"{wrapper}images/{n}.PNG": picture(n) for n in range(6)}
    table = "file,label\n" + "".join(f"{written.format(n=n)},{label}\n" for n, label in enumerate(LABELS))
    dataset = ingest({**pictures, f"{wrapper}labels.csv": table.encode()})
    assert (dataset.splits, dataset.skipped) == ({"train": {"cat": 3, "dog": 3}}, ())


def test_a_name_that_fits_several_pictures_or_another_folder_fits_none(ingest: Ingest) -> None:
    twins = {"images/a.jpg": picture(50), "images/A.jpg": picture(51), "images/a.png": picture(52)}
    more = "images/A.JPG,cat\nimages/a,cat\nother/5.png,dog\n"
    dataset = ingest({**PICTURES, **twins, "labels.csv": (TABLE + more).encode()})
    assert dataset.images == 6
    assert {one.name for one in dataset.skipped} == {*twins, "images/A.JPG", "images/a", "other/5.png"}


COLUMNS = {
    "breeds as at Kaggle": "id,breed",
    "an image and its category": "image_id,category",
    "two columns, one known": "Image Name,what",
    "two columns, the label known": "photo_of,target",
    "a column of row numbers": ",image,kind",
    "pandas' row numbers": "Unnamed: 0,img_path,label",
    "Excel's separator": "sep=;\r\nfile;label",
    "bars": "file|label",
    "blanks behind commas": "file, label",
}


@pytest.mark.parametrize("heading", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_columns_separators_and_encodings(ingest: Ingest, heading: str, encoding: str) -> None:
    names = heading.rpartition("\n")[2]
    between = next(mark for mark in (", ", ";", "|", ",") if mark in names)
    number = [""] if names.count(between) > 1 else []
    lines = [between.join([*number, f"images/{n}.png", label]) for n, label in enumerate(["Käfer", "dog"] * 3)]
    table = "\n".join([heading, *lines])
    assert ingest({**PICTURES, "labels.csv": table.encode(encoding)}).labels == ("Käfer", "dog")


def test_a_column_chosen_by_name(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    lines = [f"images/{n}.png,{label},{'odd' if n % 2 else 'even'}" for n, label in enumerate(LABELS)]
    table = "\n".join(["file,label,parity", *lines]).encode()
    archive = write_zip(tmp_path / "a.zip", {**PICTURES, "labels.csv": table})
    with pytest.raises(BadRequest, match="called kind, found: 'file', 'label', 'parity'"):
        store.ingest(archive, label_column="kind")
    with pytest.raises(BadRequest, match="column 'kind', found neither"):
        store.ingest(write_zip(tmp_path / "b.zip", FOLDERS), label_column="kind")
    assert tree(root) == EMPTY
    assert store.ingest(archive, label_column="parity").labels == ("even", "odd")


BAD_TABLES = {
    "no file column": ("labels.csv", "age,sex,label\n1,f,cat\n", "path or image, found: 'age', 'sex', 'label'"),
    "no label column": ("metadata.csv", "file_name,text,x\na,b,\n", "label or class, found: 'file_name', 'text', 'x'"),
    "two file columns": ("labels.csv", "file,path,label\na,b,c\n", "found: 'file', 'path'"),
    "two label columns": ("labels.csv", "file,label,Label\na,b,c\n", "found: 'label', 'Label'"),
    "two splits": ("labels.csv", "file,label,split,Split\na,b,c,d\n", "at most one column called split, found 2"),
    "no heading": ("labels.csv", ROWS, "found: 'images/0.png', 'cat'"),
    "empty": ("labels.csv", "", "found: none"),
    "heading only": ("labels.csv", "file,label\n", "has no rows"),
    "a split nobody knows": ("labels.csv", "file,label,split\nimages/0.png,cat,fold 3\n", "line 2: expected a split"),
    "two labels": ("labels.csv", TABLE + "images/0.png,dog\n", "line 2 of labels.csv and line 8 of labels.csv label"),
    "an open quote": ("labels.csv", TABLE + '"images', "no valid CSV"),
    "a field of a megabyte": ("labels.csv", TABLE + "x" * 2**20 + ",cat\n", "no valid CSV"),
    "a label of a novel": ("labels.csv", "file,label\nimages/0.png," + "x" * 300, "at most 200 are allowed"),
    "not JSON": ("labels.jsonl", "file,label\n", "line 1: expected a JSON object, got 'file,label'"),
    "a JSON list": ("labels.jsonl", '["a.png", "cat"]\n', "line 1: expected a JSON object"),
    "deep JSON": ("labels.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
    "several labels": ("labels.jsonl", '{"file": "images/0.png", "label": ["a", "b"]}', "got [\"a\", \"b\"]"),
    "a fraction": ("labels.jsonl", '{"file": "images/0.png", "label": 0.5}', "an integer as 'label', got 0.5"),
    "no label key": ("labels.jsonl", '{"file": "images/0.png", "a": 1, "b": 1}', "found: 'file', 'a', 'b'"),
    "UTF-16 without a mark": ("labels.csv", TABLE.encode("utf-16-le").decode("utf-8"), "mark, got zero bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "table", "says"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables_are_refused_with_what_was_found(
    root: Path, tmp_path: Path, name: str, table: str, says: str
) -> None:
    detail = refusal(DatasetStore(root, **LIMITS), root, tmp_path, {**PICTURES, name: table.encode()})
    assert says in detail
    assert name in detail or "class" in detail


def test_other_bytes_than_utf_8_are_refused(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    detail = refusal(store, root, tmp_path, {**PICTURES, "labels.csv": TABLE.replace("cat", "Käfer").encode("cp1252")})
    assert "labels.csv: expected UTF-8, or UTF-16 with a byte order mark, got something else at byte" in detail
    assert "as Windows-1252 its line reads 'images/0.png,Käfer'" in detail


@pytest.mark.parametrize("others", [["manifest.csv"], ["labels.jsonl"], ["train/metadata.csv"]])
def test_two_tables_for_the_same_pictures_are_refused(
    store: DatasetStore, root: Path, tmp_path: Path, others: list[str]
) -> None:
    tables = dict.fromkeys(["labels.csv", *others], TABLE.encode())
    detail = refusal(store, root, tmp_path, {**PICTURES, **tables})
    assert f"found: labels.csv, {others[0]}" in detail


def test_too_large_and_too_long_tables_are_refused(root: Path, tmp_path: Path) -> None:
    small = DatasetStore(root, **LIMITS, max_file_bytes=20_000)
    table = (TABLE + "x.png,cat\n" * 3000).encode()
    assert "larger than 20,000 bytes" in refusal(small, root, tmp_path, {**PICTURES, "labels.csv": table})
    few = DatasetStore(root, **{**LIMITS, "max_images": 1000})
    assert "more than the 2,000 rows" in refusal(few, root, tmp_path, {**PICTURES, "labels.csv": table})


def test_class_folders_that_hold_tables_of_their_own_are_class_folders(ingest: Ingest) -> None:
    dataset = ingest({**FOLDERS, "cat/labels.csv": b"whatever", "dog/metadata.csv": b"whatever"})
    assert dataset.splits == {"train": {"cat": 3, "dog": 3}}
    assert {one.reason for one in dataset.skipped} == {"a table of labels that is not beside the pictures"}


def test_a_table_without_pictures_is_no_dataset(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    assert "no readable picture" in refusal(store, root, tmp_path, {"labels.csv": TABLE.encode()})


def test_a_truncated_archive_with_a_table_leaves_nothing(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    whole = write_tgz(tmp_path / "a", {**PICTURES, "labels.csv": TABLE.encode()}).read_bytes()
    for end in (len(whole) // 3, len(whole) // 2, len(whole) - 9):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(BadRequest) as caught:
            store.ingest(tmp_path / "cut")
        assert caught.value.code == "bad_archive"
        assert tree(root) == EMPTY
