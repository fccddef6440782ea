"""The dataset store: real pictures, real archives, real disks that fill up and processes that die."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from server.datasets.dataset import Dataset
from server.datasets.dataset_store import DatasetStore
from server.engine.images import decode as decoder
from server.errors import BadRequest, DiskFull, NotFound, Unavailable

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS: dict[str, Any] = {"max_images": 2000, "max_unpacked_bytes": 2**28, "max_image_pixels": 10**6}


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    image = Image.new("RGB", size, (seed * 53 % 256, seed * 101 % 256, seed * 7 % 256))
    ImageDraw.Draw(image).ellipse((2, 2, 4 + seed % 12, 12), fill=(255, seed % 256, 0))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def pets(shift: int = 0, count: int = 3) -> dict[str, bytes]:
    return {
        f"{label}/{number}.png": picture(shift + 1000 * index + number)
        for index, label in enumerate(("cat", "dog"))
        for number in range(count)
    }


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tree(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").glob("*/*")}


EMPTY = {"lock": 0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, **LIMITS)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "pets.zip", pets())


# --- ingesting --------------------------------------------------------------------------------------------------------


def test_an_ingested_dataset_can_be_got_and_its_pictures_read(store: DatasetStore, archive: Path) -> None:
    dataset = store.ingest(archive, name="  my\npets ")
    assert (dataset.name, dataset.labels, dataset.images, dataset.skipped) == ("my pets", ("cat", "dog"), 6, ())
    assert dataset.splits == {"train": {"cat": 3, "dog": 3}}
    assert dataset.bytes == sum(map(len, pets().values()))
    assert {one.name: store.read(one.sha256) for one in dataset.examples} == pets()
    assert {(one.width, one.height) for one in dataset.examples} == {(24, 16)}
    assert store.get(dataset.id) == store.get(dataset.id[:8]) == dataset
    assert store.list() == [dataset]


def test_the_id_is_the_same_whatever_the_archive_and_the_names(store: DatasetStore, tmp_path: Path, root: Path) -> None:
    first = store.ingest(write_zip(tmp_path / "a", pets()), name="first")
    before = tree(root)
    renamed = {f"pets/train/{name.replace('.png', '.jpeg')}": data for name, data in reversed(pets().items())}
    second = store.ingest(write_tgz(tmp_path / "b", renamed), name="second")
    assert second == first
    assert tree(root) == before
    assert store.ingest(write_zip(tmp_path / "c", pets(1))).id != first.id


def test_every_picture_is_on_the_disk_before_its_dataset_is_there(
    store: DatasetStore, archive: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def check(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in flushed
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    assert store.ingest(archive).images == len(blobs(root)) == 6


def test_pictures_are_kept_once_and_as_they_came(store: DatasetStore, tmp_path: Path, root: Path) -> None:
    twice = {**pets(), "cat/again.png": pets()["cat/0.png"]}
    dataset = store.ingest(write_zip(tmp_path / "a", twice))
    assert dataset.images == 7
    store.ingest(write_zip(tmp_path / "b", {**pets(), **pets(count=4)}))
    assert len(blobs(root)) == 8
    for path in (root / "blobs").glob("*/*"):
        assert path.parent.name == path.name[:2]


def test_what_is_no_picture_is_skipped_and_listed_with_the_reason(store: DatasetStore, tmp_path: Path) -> None:
    bad = {
        "cat/notes.txt": b"not a picture",
        "cat/empty.png": b"",
        "dog/cut.png": picture(9)[:-40],
        "dog/bomb.png": picture(9, (2000, 2000)),
        "loose.png": picture(77),
    }
    dataset = store.ingest(write_zip(tmp_path / "a", {**pets(), **bad}))
    assert {one.name for one in dataset.skipped} == set(bad)
    assert all(one.reason for one in dataset.skipped)
    assert dataset.images == 6
    assert {one.name: one.reason for one in dataset.skipped}["loose.png"] == "not in a class folder"


def test_a_file_too_large_for_a_picture_is_skipped(root: Path, tmp_path: Path) -> None:
    store = DatasetStore(root, **LIMITS, max_file_bytes=5000)
    dataset = store.ingest(write_tgz(tmp_path / "a", {"cat/film.mp4": os.urandom(50_000), **pets()}))
    assert [(one.name, one.reason) for one in dataset.skipped] == [("cat/film.mp4", "larger than 5,000 bytes")]


def test_the_list_of_what_was_skipped_is_bounded(store: DatasetStore, tmp_path: Path) -> None:
    junk = {f"cat/{number}.txt": b"" for number in range(1010)}
    skipped = store.ingest(write_zip(tmp_path / "a", {**junk, **pets()})).skipped
    assert len(skipped) == 1001
    assert skipped[-1].reason == "and 10 more files"


def test_more_pictures_than_allowed_are_refused(root: Path, tmp_path: Path) -> None:
    store = DatasetStore(root, **{**LIMITS, "max_images": 5})
    with pytest.raises(BadRequest, match="more than the 5 pictures allowed"):
        store.ingest(write_zip(tmp_path / "a", pets()))
    assert tree(root) == EMPTY


def test_a_bad_dataset_leaves_nothing(store: DatasetStore, tmp_path: Path, root: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        store.ingest(write_zip(tmp_path / "a", {"cat/1.png": picture(1), "cat/2.png": picture(2)}))
    assert caught.value.code == "bad_dataset"
    assert tree(root) == EMPTY


def test_progress_counts_files_and_bytes(store: DatasetStore, archive: Path) -> None:
    seen: list[tuple[int, int]] = []
    store.ingest(archive, progress=lambda files, read: seen.append((files, read)))
    assert [files for files, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1][1] == sum(map(len, pets().values()))


def test_an_ingest_that_is_interrupted_leaves_nothing(store: DatasetStore, archive: Path, root: Path) -> None:
    def stop(files: int, read: int) -> None:
        if files == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.ingest(archive, progress=stop)
    assert tree(root) == EMPTY
    assert not any((root / "staging").iterdir())


@pytest.mark.shared
def test_real_photographs(store: DatasetStore, shared: Path, tmp_path: Path) -> None:
    folder = shared / "datasets" / "trashnet"
    zipped = store.ingest(Path(shutil.make_archive(str(tmp_path / "a"), "zip", folder)))
    tarred = store.ingest(Path(shutil.make_archive(str(tmp_path / "b"), "gztar", folder.parent, "trashnet")))
    assert zipped == tarred
    assert zipped.labels == ("cardboard", "glass", "metal", "paper", "plastic", "trash")
    assert {split: sum(counts.values()) for split, counts in zipped.splits.items()} == {"train": 360, "test": 150}
    assert zipped.skipped == ()
    assert {(one.width, one.height) for one in zipped.examples} == {(256, 341)}


# --- getting, deleting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset_id", ["", "abc", "0" * 64, "0" * 8, "../lock", "*" * 8, "g" * 64, "A" * 64, "0" * 65])
def test_an_unknown_id_is_not_found(store: DatasetStore, archive: Path, dataset_id: str) -> None:
    store.ingest(archive)
    for call in (store.get, store.delete, store.read):
        with pytest.raises(NotFound) as caught:
            call(dataset_id)
        assert caught.value.code == "dataset_not_found"


def test_a_prefix_that_is_not_unique_is_refused(store: DatasetStore, archive: Path, root: Path) -> None:
    dataset = store.ingest(archive)
    twin = dataset.id[:10] + "".join("0123456789abcdef"[15 - int(digit, 16)] for digit in dataset.id[10:])
    shutil.copy(root / "datasets" / f"{dataset.id}.json", root / "datasets" / f"{twin}.json")
    with pytest.raises(NotFound, match="2 datasets begin with"):
        store.get(dataset.id[:10])
    assert store.get(dataset.id[:11]) == dataset


def test_deleting_keeps_the_pictures_that_others_use(store: DatasetStore, tmp_path: Path, root: Path) -> None:
    small = store.ingest(write_zip(tmp_path / "a", pets(count=3)))
    large = store.ingest(write_zip(tmp_path / "b", pets(count=5)))
    store.delete(large.id[:12])
    assert store.list() == [small]
    assert blobs(root) == {one.sha256 for one in small.examples}
    store.delete(small.id)
    assert tree(root) == EMPTY
    assert not any((root / "blobs").iterdir())
    with pytest.raises(NotFound):
        store.read(small.examples[0].sha256)


def test_a_picture_damaged_on_the_disk_is_noticed(store: DatasetStore, archive: Path, root: Path) -> None:
    sha256 = store.ingest(archive).examples[0].sha256
    (root / "blobs" / sha256[:2] / sha256).write_bytes(picture(5))
    with pytest.raises(Unavailable, match="damaged"):
        store.read(sha256)


def test_a_damaged_manifest_costs_no_other_dataset(store: DatasetStore, tmp_path: Path, root: Path) -> None:
    broken = store.ingest(write_zip(tmp_path / "a", pets()))
    whole = store.ingest(write_zip(tmp_path / "b", pets(count=4)))
    (root / "datasets" / f"{broken.id}.json").write_text("{")
    assert store.list() == [whole]
    with pytest.raises(Unavailable):
        store.get(broken.id)
    (root / "staging" / "dead").mkdir()
    before = blobs(root)
    assert DatasetStore(root, **LIMITS).list() == [whole]
    assert blobs(root) == before


# --- several at once, and crashes -------------------------------------------------------------------------------------


def test_ingests_and_deletions_at_once_leave_whole_datasets(store: DatasetStore, tmp_path: Path, root: Path) -> None:
    """All share pictures, so each deletion must respect what the other processes are storing."""
    archives = [write_zip(tmp_path / f"{count}", pets(count=count)) for count in (2, 3, 4, 5)]

    def churn(path: Path) -> Dataset:
        for _ in range(5):
            store.delete(store.ingest(path).id)
        return store.ingest(path)

    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(churn, archives))
    assert {one.id for one in store.list()} == {one.id for one in kept}
    assert blobs(root) == {example.sha256 for one in kept for example in one.examples}
    for one in kept:
        assert all(store.read(example.sha256) for example in one.examples)


SETTING = f"""
import os, sys, time
from pathlib import Path
from server.engine.images import decode as decoder
from server.datasets.dataset_store import DatasetStore
store = DatasetStore(Path(sys.argv[1]), **{LIMITS!r})
"""
HANG_IN_STAGING = (
    SETTING
    + """
def hang(files, read):
    if files == 4:
        print("staged", flush=True)
        time.sleep(600)
store.ingest(Path(sys.argv[2]), progress=hang)
"""
)
HANG_BEFORE_THE_MANIFEST = (
    SETTING
    + """
replace = os.replace
def hang(source, target):
    if str(target).endswith(".json"):
        print("moved", flush=True)
        time.sleep(600)
    replace(source, target)
os.replace = hang
store.ingest(Path(sys.argv[2]))
"""
)
HANG_IN_DELETION = (
    SETTING
    + """
dataset = store.ingest(Path(sys.argv[2]))
def hang(blobs):
    print("hidden", flush=True)
    time.sleep(600)
store._remove = hang
store.delete(dataset.id)
"""
)


def start(script: str, *args: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE)


@pytest.fixture
def hung(root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    process = start(request.param, root, write_zip(tmp_path / "hung.zip", pets(500)))
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("staged", "moved", "hidden")
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "hung",
    [HANG_IN_STAGING, HANG_BEFORE_THE_MANIFEST, HANG_IN_DELETION],
    ids=["in staging", "before the manifest", "in a deletion"],
    indirect=True,
)
def test_what_a_killed_process_left_is_swept_at_the_next_start(
    hung: subprocess.Popen[str], root: Path, archive: Path
) -> None:
    assert len(tree(root)) > 2
    os.kill(hung.pid, signal.SIGKILL)
    hung.wait()
    store = DatasetStore(root, **LIMITS)
    assert tree(root) == EMPTY
    assert store.list() == []
    assert store.ingest(archive).images == 6


@pytest.mark.parametrize("hung", [HANG_IN_STAGING], indirect=True)
def test_a_living_ingest_of_another_process_is_not_swept(
    hung: subprocess.Popen[str], root: Path, archive: Path
) -> None:
    before = set(tree(root))
    store = DatasetStore(root, **LIMITS)
    assert set(tree(root)) == before
    store.delete(store.ingest(archive).id)
    assert set(tree(root)) == before


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def noise(count: int) -> dict[str, bytes]:
    """Pictures of 12 kB each that do not compress."""
    files = {}
    for number in range(count):
        out = io.BytesIO()
        Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(out, "PNG")
        files[f"{'cat' if number % 2 else 'dog'}/{number}.png"] = out.getvalue()
    return files


def test_a_full_disk_is_told_and_left_as_it_was(small_disk: Path, tmp_path: Path) -> None:
    root = small_disk / "datasets"
    store = DatasetStore(root, **LIMITS)
    kept = store.ingest(write_zip(tmp_path / "small.zip", noise(10)))
    before = tree(root)
    with pytest.raises(DiskFull) as caught:
        store.ingest(write_zip(tmp_path / "large.zip", noise(200)))
    assert caught.value.code == "disk_full"
    assert str(small_disk) not in caught.value.detail
    assert tree(root) == before
    assert store.list() == [kept]
    assert store.ingest(write_zip(tmp_path / "other.zip", noise(10))).images == 10


LIMITED = (
    SETTING
    + """
import json, resource
from server.errors import DiskFull
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    store.ingest(Path(sys.argv[2]))
except DiskFull as error:
    print(json.dumps([error.code, error.detail]))
"""
)


def test_a_file_that_the_system_refuses_to_grow_is_a_full_disk(root: Path, tmp_path: Path) -> None:
    """The same without the right to mount: the kernel stops the write of the first picture above 8,000 bytes."""
    process = start(LIMITED, root, write_zip(tmp_path / "a.zip", {**pets(), **noise(2)}))
    assert json.loads(process.communicate(timeout=60)[0])[0] == "disk_full"
    assert tree(root) == EMPTY


@pytest.mark.parametrize("number", [1, 3, 7])
def test_a_disk_that_fills_up_while_blobs_move_in_is_left_as_it_was(
    store: DatasetStore, archive: Path, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = 0
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskFull):
        store.ingest(archive)
    assert calls == number
    assert tree(root) == EMPTY
    assert store.ingest(archive).images == 6


def test_a_decoder_may_be_given(root: Path, archive: Path) -> None:
    seen: list[int] = []

    def counted(data: bytes, *, max_pixels: int) -> Image.Image:
        seen.append(max_pixels)
        return decoder.decode(data, max_pixels=max_pixels)

    DatasetStore(root, **LIMITS, decode=counted).ingest(archive)
    assert seen == [10**6] * 6


def test_four_digits_of_an_id_will_do_and_fewer_will_not(store: DatasetStore, archive: Path) -> None:
    dataset = store.ingest(archive)
    assert store.get(dataset.id[:4]).id == dataset.id
    with pytest.raises(NotFound):
        store.get(dataset.id[:3])
