"""NumPy archives of labelled pictures: as MedMNIST writes them, cut off, and made to do harm."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server.datasets.dataset import Dataset
from server.datasets.dataset_store import DatasetStore
from server.datasets.formats.png import png
from server.errors import BadRequest
from tests.datasets.test_dataset_store import EMPTY, LIMITS, tree, write_zip

Arrays = dict[str, Any]
GENERATOR = np.random.default_rng(1)
GREY = GENERATOR.integers(0, 256, (6, 9, 7), np.uint8)
RGB = GENERATOR.integers(0, 256, (6, 9, 7, 3), np.uint8)
LABELS = np.array([0, 1, 0, 1, 10, 10])
ARRAYS: Arrays = {"train_images": GREY, "train_labels": LABELS[:, None].astype(np.uint8)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, **LIMITS)


def npz(arrays: Arrays, save: Callable[..., None] = np.savez_compressed) -> bytes:
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def ingest(store: DatasetStore, tmp_path: Path, data: bytes) -> Dataset:
    (tmp_path / "a.npz").write_bytes(data)
    return store.ingest(tmp_path / "a.npz")


def refusal(store: DatasetStore, root: Path, tmp_path: Path, data: bytes, code: str = "bad_dataset") -> str:
    with pytest.raises(BadRequest) as caught:
        ingest(store, tmp_path, data)
    assert caught.value.code == code, caught.value.detail
    assert tree(root) == EMPTY
    return caught.value.detail


def pixels(store: DatasetStore, dataset: Dataset, name: str) -> np.ndarray[Any, Any]:
    [example] = [one for one in dataset.examples if one.name == name]
    return np.asarray(Image.open(io.BytesIO(store.read(example.sha256))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "images",
    [GREY, GREY[..., None], RGB, np.asfortranarray(GREY), np.asfortranarray(RGB)],
    ids=["grey", "one channel", "RGB", "grey in Fortran order", "RGB in Fortran order"],
)
def test_arrays_become_pictures(store: DatasetStore, tmp_path: Path, save: Any, images: Any) -> None:
    splits = {"val_images": images[:3], "val_labels": LABELS[:3], "test_images": images, "test_labels": LABELS}
    dataset = ingest(store, tmp_path, npz({**ARRAYS, "train_images": images, **splits}, save))
    assert dataset.labels == ("0", "1", "10")
    assert dataset.splits == {
        "train": {"0": 2, "1": 2, "10": 2}, "val": {"0": 2, "1": 1, "10": 0}, "test": {"0": 2, "1": 2, "10": 2},
    }  # fmt: skip
    for number in range(6):
        assert np.array_equal(pixels(store, dataset, f"test_images/{number}.png"), images[number].squeeze())
    assert dataset.report.modes == {"RGB" if images.shape == RGB.shape else "L": 15}
    assert {(one.width, one.height) for one in dataset.examples} == {(7, 9)}


def test_names_are_taken_where_the_archive_has_them(store: DatasetStore, tmp_path: Path) -> None:
    names = np.array([f"class {number}" for number in range(10)] + ["Käfer"])
    assert ingest(store, tmp_path, npz({**ARRAYS, "class_names": names})).labels == ("Käfer", "class 0", "class 1")
    ascii_names = np.array([b"nought", b"one", *[b""] * 8, b"ten"])
    dataset = None
    with pytest.raises(BadRequest, match="without any letter"):
        dataset = ingest(store, tmp_path, npz({**ARRAYS, "labels": ascii_names}))
    ascii_names[ascii_names == b""] = b"other"
    dataset = ingest(store, tmp_path, npz({**ARRAYS, "labels": ascii_names}))
    assert dataset.labels == ("nought", "one", "ten")


def test_the_same_pictures_in_a_zip_are_the_same_dataset(store: DatasetStore, tmp_path: Path) -> None:
    dataset = ingest(store, tmp_path, npz(ARRAYS))
    files = {f"{LABELS[number]}/{number}.png": png(GREY[number][..., None]) for number in range(6)}
    assert store.ingest(write_zip(tmp_path / "a.zip", files)).id == dataset.id


def test_other_arrays_are_listed(store: DatasetStore, tmp_path: Path) -> None:
    skipped = ingest(store, tmp_path, npz({**ARRAYS, "mean": np.zeros(3), "train_masks": GREY})).skipped
    assert [(one.name, one.reason) for one in skipped] == [
        ("mean.npy", "an array that is neither images nor labels"),
        ("train_masks.npy", "an array that is neither images nor labels"),
    ]


def test_a_zip_with_one_other_file_is_no_npz(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    out = io.BytesIO(npz(ARRAYS))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("readme.txt", b"hello")
    assert "no readable picture" in refusal(store, root, tmp_path, out.getvalue())


@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 400, 3), (3, 65_536 // 3, 1)])
def test_a_png_is_its_pixels(shape: tuple[int, int, int]) -> None:
    image = GENERATOR.integers(0, 256, shape, np.uint8)
    data = png(image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image.squeeze(2) if shape[2] == 1 else image)
    assert png(image) == data


CHEST = np.zeros((6, 14), np.uint8)
BAD: dict[str, tuple[Arrays, str]] = {
    "multi-label": ({**ARRAYS, "train_labels": CHEST}, "multi-label): train_labels uint8 [6, 14]"),
    "no labels": ({"train_images": GREY}, "found: train_images uint8 [6, 9, 7]"),
    "labels only": ({"train_labels": LABELS}, "found: train_labels int64 [6]"),
    "other names": ({"x_train": GREY, "y_train": LABELS}, "found: x_train uint8 [6, 9, 7], y_train int64 [6]"),
    "images of a split without labels": ({**ARRAYS, "val_images": GREY}, "and likewise for val and test"),
    "two of a split": ({**ARRAYS, "training_images": GREY}, "found train_images and training_images"),
    "float images": ({**ARRAYS, "train_images": GREY / 255}, "found train_images float64 [6, 9, 7]"),
    "volumes": ({**ARRAYS, "train_images": np.zeros((6, 8, 8, 8), np.uint8)}, "found train_images uint8 [6, 8, 8, 8]"),
    "flat images": ({**ARRAYS, "train_images": GREY.reshape(6, -1)}, "found train_images uint8 [6, 63]"),
    "no pixels": ({**ARRAYS, "train_images": GREY[:, :0]}, "sides of 1 to 32,768"),
    "too few labels": ({**ARRAYS, "train_labels": LABELS[:5]}, "an integer for each of the 6 pictures"),
    "float labels": ({**ARRAYS, "train_labels": LABELS / 2}, "found train_labels float64 [6]"),
    "a label without a name": ({**ARRAYS, "classes": np.array(["a", "b"])}, "labels from 0 to 1, which have"),
    "names twice": ({**ARRAYS, "classes": np.array(["a"]), "labels": np.array(["b"])}, "one array of class names"),
    "names that are numbers": ({**ARRAYS, "classes": np.arange(11)}, "text [C], found classes int64 [11]"),
    "one class": ({**ARRAYS, "train_labels": LABELS * 0}, "at least two classes, got one: '0'"),
    "one of a class": ({**ARRAYS, "train_labels": np.array([0, 0, 0, 0, 0, 1])}, "'1' has 1 training picture"),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "says"), BAD.values(), ids=BAD)
def test_what_is_no_labelled_set_is_refused(root: Path, tmp_path: Path, arrays: Arrays, says: str) -> None:
    assert says in refusal(DatasetStore(root, **LIMITS), root, tmp_path, npz(arrays))


# --- hostile ----------------------------------------------------------------------------------------------------------


class Boom:
    def __reduce__(self) -> Any:
        return (exit, ("unpickled",))


def headed(header: str | bytes, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + content


def described(descr: str, shape: str, fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def zipped(images: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        labels = io.BytesIO()
        np.save(labels, LABELS)
        archive.writestr("train_labels.npy", labels.getvalue())
        archive.writestr("train_images.npy", images)
    return out.getvalue()


ATTACKS: dict[str, tuple[bytes, str]] = {
    "a pickle": (zipped(pickle.dumps(Boom())), "no NumPy array of format 1 or 2"),
    "objects": (npz({**ARRAYS, "extra": np.array([Boom()], object)}), "'extra' holds Python objects (pickle)"),
    "objects in a structure": (zipped(headed(described("[('a', 'O')]", "(6,)"), bytes(48))), "holds Python objects"),
    "a shape of terabytes": (
        zipped(headed(described("'|u1'", "(6, 1000000, 1000000)"), GREY.tobytes())),
        "takes 6,000,000,000,000 bytes, but its member has 378",
    ),
    "more pictures than bytes": (zipped(headed(described("'|u1'", "(7, 9, 7)"), GREY.tobytes())), "takes 441 bytes"),
    "fewer pictures than bytes": (zipped(headed(described("'|u1'", "(5, 9, 7)"), GREY.tobytes())), "takes 315 bytes"),
    "a negative shape": (zipped(headed(described("'|u1'", "(6, -9, -7)"), GREY.tobytes())), "expected sides"),
    "a shape beyond integers": (zipped(headed(described("'|u1'", f"({10**400},)"))), "takes 1"),
    "a header of gigabytes": (zipped(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"), "a header of 4,294,967,295 bytes"),
    "a header that is a program": (
        zipped(headed("__import__('os').system('false') #'descr'\n")),
        "cannot be read (ValueError)",
    ),
    "a header of brackets": (zipped(headed("(" * 9000)), "cannot be read"),
    "a header of minuses": (zipped(headed("-" * 9000 + "1")), "cannot be read"),
    "a header of no text": (zipped(headed(bytes(range(256)))), "cannot be read"),
    "an unknown type": (zipped(headed(described("'|zz'", "(6,)"))), "cannot be read"),
    "a later format": (zipped(headed(described("'|u1'", "(6,)"), version=b"\x03\x00")), "no NumPy array of format 1"),
    "nothing": (zipped(b""), "it begins with nothing"),
    "half a magic": (zipped(b"\x93NUM"), "it begins with 93 4e 55 4d"),
    "cut in its header": (zipped(headed(described("'|u1'", "(6, 9, 7)"))[:30]), "cannot be read (ValueError)"),
    "a bomb": (npz({**ARRAYS, "train_images": np.zeros((6, 2000, 2000), np.uint8)}), "as a bomb does"),
}


@pytest.mark.parametrize(("data", "says"), ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused(root: Path, tmp_path: Path, data: bytes, says: str) -> None:
    code = "bad_dataset" if says == "expected sides" else "bad_archive"
    assert says in refusal(DatasetStore(root, **LIMITS), root, tmp_path, data, code)


def test_one_picture_too_large_is_refused_before_it_is_read(
    store: DatasetStore, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = npz({**ARRAYS, "train_images": np.zeros((6, 1, 40_000), np.uint8)}, np.savez)
    assert "sides of 1 to 32,768" in refusal(store, root, tmp_path, long)
    monkeypatch.setattr("server.datasets.formats.npz_members.MAX_PICTURE_BYTES", 62)
    assert "at most 62 bytes a picture: train_images uint8 [6, 9, 7]" in refusal(store, root, tmp_path, npz(ARRAYS))


def test_an_npz_cut_anywhere_is_refused(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    whole = npz(ARRAYS)
    for end in (20, 200, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        assert "damaged or truncated" in refusal(store, root, tmp_path, whole[:end], "bad_archive")


def test_an_npz_inside_an_archive_is_an_archive_inside(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    outer = write_zip(tmp_path / "outer.zip", {"data/set.npz": npz(ARRAYS)}).read_bytes()
    assert "the first: data/set.npz: an archive itself, which is not opened" in refusal(store, root, tmp_path, outer)


@pytest.mark.shared
@pytest.mark.slow
def test_pneumoniamnist(store: DatasetStore, shared: Path, tmp_path: Path) -> None:
    """The official split shares pictures across its splits, which is what the report is for."""
    source = shared / "datasets" / "pneumoniamnist.npz"
    with np.load(source) as arrays:
        counts = {split: len(arrays[f"{split}_labels"]) for split in ("train", "val", "test")}
        first, label = arrays["train_images"][0], int(arrays["train_labels"][0, 0])
    large = DatasetStore(tmp_path / "large", **{**LIMITS, "max_images": 10_000})
    dataset = large.ingest(source)
    assert {split: sum(labels.values()) for split, labels in dataset.splits.items()} == counts
    assert dataset.labels == ("0", "1")
    [example] = [one for one in dataset.examples if one.name == "train_images/0.png"]
    assert example.label == str(label)
    assert np.array_equal(pixels(large, dataset, "train_images/0.png"), first)
    assert "leakage" in [warning.code for warning in dataset.report.warnings]
    assert dataset.skipped == ()
