"""Where a fit's pixels come from: equal to the server's, decoded once, bounded, in order, ahead of the fit."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from server.datasets.dataset_store import DatasetStore
from server.engine.images.decode import _MAX_WHOLE, Geometry, decode, fit, whole
from server.errors import NotFound, ServiceError
from server.training import augment
from server.training.augment import Views
from server.training.caches.pixel_cache import PixelCache
from server.training.cut import Cut, crop_at
from server.training.data import InMemory, Source, read_pictures
from server.training.prefetch import prefetch
from server.training.stored_images import Decoder, StoredImages

GEOMETRY = Geometry(56, "bicubic", 0.875, "center")
ALL = np.arange(24)
SOON_S = 20
NO_CACHE = PixelCache(None, disk_bytes=0, memory_bytes=0)


def picture(seed: int, width: int, height: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


BLOBS = {
    hashlib.sha256(data).hexdigest(): data
    for data in (picture(seed, 40 + 7 * (seed % 5), 90 - 11 * (seed % 7)) for seed in range(len(ALL)))
}
SUMS = list(BLOBS)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def stored(
    pool: ThreadPoolExecutor,
    cache: PixelCache | None = None,
    *,
    read: Callable[[str], bytes] = BLOBS.__getitem__,
    sums: list[str] = SUMS,
    geometry: Geometry = GEOMETRY,
) -> StoredImages:
    return StoredImages.of(sums, Decoder(read, geometry, 10**6, cache or NO_CACHE, pool))


class Counted:
    """The blobs, and how often each was read."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()

    def __call__(self, sha256: str) -> bytes:
        self.times[sha256] += 1
        return BLOBS[sha256]


def eager(sums: list[str] = SUMS) -> np.ndarray:
    """The pixels as they were read before there were caches: one after the other."""
    sources = [Source(lambda sha256=sha256: BLOBS[sha256], 0) for sha256 in sums]  # type: ignore[misc]
    return read_pictures(sources, GEOMETRY, max_pixels=10**6).images.read(np.arange(len(sums)))


def caches(folder: Path) -> dict[str, PixelCache]:
    return {
        "none": NO_CACHE,
        "memory": PixelCache(None, disk_bytes=0, memory_bytes=2**24),
        "disk": PixelCache(folder, disk_bytes=2**24, memory_bytes=0),
        "both": PixelCache(folder, disk_bytes=2**24, memory_bytes=2**24),
    }


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "memory", "disk", "both"])
def test_pixels_are_those_that_the_server_sees_whatever_keeps_them(
    pool: ThreadPoolExecutor, tmp_path: Path, kind: str
) -> None:
    result, order = stored(pool, caches(tmp_path)[kind]), np.random.default_rng(0).permutation(ALL)
    for _ in range(2):
        np.testing.assert_array_equal(result.read(order), eager()[order])
    assert len(result.read(np.array([], np.int64))) == 0
    assert len(result) == len(ALL)


def test_splits_are_parts_of_the_same_pictures(pool: ThreadPoolExecutor) -> None:
    part = stored(pool).take(np.array([5, 3, 9]))
    assert len(part) == 3
    np.testing.assert_array_equal(part.read(np.array([2, 0])), eager()[[9, 5]])


def test_many_threads_keep_the_order(pool: ThreadPoolExecutor) -> None:
    """Sixteen threads, and pictures that are wanted several times in one batch."""
    with ThreadPoolExecutor(16) as many:
        order = np.random.default_rng(1).integers(0, len(ALL), 500)
        np.testing.assert_array_equal(stored(many).read(order), eager()[order])


def test_views_are_crops_of_the_whole_and_mirrored(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """FGVC: shorter side to 8/7 of the size, a square of the size anywhere in it, mirrored or not."""
    just_below_1 = float(np.nextafter(1, 0))
    corners = [(0.0, 0.0), (just_below_1, just_below_1), (0.0, just_below_1), (0.5, 0.25)]
    result = stored(pool, caches(tmp_path)["disk"])
    for sha256, row in zip(SUMS, ALL, strict=True):
        image = decode(BLOBS[sha256], max_pixels=10**6)
        scale = 64 / min(image.size)
        width, height = (64 if side == min(image.size) else int(side * scale) for side in image.size)
        resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
        places = [
            (0, 0), (height - 56, width - 56), (0, width - 56), ((height - 55) // 2, (width - 55) // 4),
        ]  # fmt: skip
        views = Views(np.array(corners * 2), np.repeat([False, True], 4))
        seen = result.read(np.repeat(row, 8), views)
        for number, (top, left) in enumerate(places * 2):
            expected = resized[top : top + 56, left : left + 56]
            np.testing.assert_array_equal(seen[number], expected[:, ::-1] if number >= 4 else expected)


def test_flipping_mirrors_what_the_server_sees(pool: ThreadPoolExecutor) -> None:
    views = Views(None, ALL % 2 == 0)
    np.testing.assert_array_equal(stored(pool).read(ALL, views), InMemory(eager()).read(ALL, views))


def test_every_place_of_a_crop_is_equally_likely() -> None:
    ramp = np.broadcast_to(np.arange(66, dtype=np.uint8)[:, None, None], (66, 56, 3))
    drawn = augment.draw("crop", 11_000, torch.Generator().manual_seed(1))
    assert drawn is not None
    assert drawn.corner is not None
    counts = Counter(int(crop_at(ramp, 56, *corner)[0, 0, 0]) for corner in drawn.corner)
    assert set(counts) == set(range(11))
    assert min(counts.values()) > 850


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 301), (31, 500), (500, 31), (64, 64), (1, 1)])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_the_whole_is_torchvisions_resize(width: int, height: int, kind: str) -> None:
    image = decode(picture(1, width, height), max_pixels=10**6)
    theirs = np.array(resize(image, 64, InterpolationMode(kind)))  # type: ignore[arg-type]  # Pillow pictures too
    np.testing.assert_array_equal(whole(image, 64, kind), theirs)


def test_of_a_strip_too_long_to_resize_whole_the_middle_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.new("RGB", (9000, 3), "red")
    strip.paste("blue", (4500, 0, 9000, 3))
    for image, axis in ((strip, 1), (strip.transpose(Image.Transpose.TRANSPOSE), 0)):
        result = whole(image, 256, "bicubic")
        assert result.shape[1 - axis] == 256
        assert 2**23 < result.shape[0] * result.shape[1] <= _MAX_WHOLE
        assert tuple(result[0, 0]) == (255, 0, 0)
        assert tuple(result[-1, -1]) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_other_geometries_crop_from_their_own_square(mode: str) -> None:
    geometry = Geometry(56, "bicubic", 0.9, mode)
    image = decode(picture(1, 100, 50), max_pixels=10**6)
    result = Cut(geometry, uncropped=True)(image)
    np.testing.assert_array_equal(result, fit(image, Geometry(64, "bicubic", 1.0, mode)))


@pytest.mark.parametrize(("size", "side"), [(224, 256), (448, 512), (384, 438)])
def test_the_fgvc_recipes_sizes(size: int, side: int) -> None:
    assert Cut(Geometry(size, "bicubic", 0.9, "center"), uncropped=True).side == side


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "disk", "both"])
def test_a_picture_is_decoded_once_for_each_cut(pool: ThreadPoolExecutor, tmp_path: Path, kind: str) -> None:
    read = Counted()
    result = stored(pool, caches(tmp_path)[kind], read=read)
    views = augment.draw("crop", len(ALL), torch.Generator().manual_seed(0))
    for _ in range(3):
        result.read(ALL)
    assert set(read.times.values()) == {1}
    for _ in range(3):
        result.read(ALL, views)
    assert set(read.times.values()) == {2}


def test_without_a_cache_a_picture_is_decoded_once_an_epoch(pool: ThreadPoolExecutor) -> None:
    read = Counted()
    list(prefetch(stored(pool, read=read), np.array_split(ALL, 5), None))
    assert read.times == dict.fromkeys(SUMS, 1)
    stored(pool, read=read).read(np.repeat(ALL, 3))
    assert read.times == dict.fromkeys(SUMS, 2)


def test_what_was_decoded_is_there_for_the_next_worker_and_other_cuts_are_not_confused(
    pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    stored(pool, caches(tmp_path)["disk"]).read(ALL)
    read = Counted()
    np.testing.assert_array_equal(stored(pool, caches(tmp_path)["disk"], read=read).read(ALL), eager())
    assert not read.times
    for other in (Geometry(56, "bilinear", 0.875, "center"), Geometry(56, "bicubic", 1.0, "center")):
        again = stored(pool, caches(tmp_path)["disk"], read=read, geometry=other).read(ALL)
        np.testing.assert_array_equal(again, stored(pool, geometry=other).read(ALL))
    assert set(read.times.values()) == {2}


def test_a_damaged_file_is_decoded_anew(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    stored(pool, caches(tmp_path)["disk"]).read(ALL)
    files = [path for path in tmp_path.rglob("*") if len(path.name) == 64]
    assert len(files) == len(ALL)
    for number, path in enumerate(files):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if number % 2 else content[: number * 10])
    read = Counted()
    for _ in range(2):
        np.testing.assert_array_equal(stored(pool, caches(tmp_path)["disk"], read=read).read(ALL), eager())
    assert set(read.times.values()) == {1}


def test_nobody_can_change_what_others_get(pool: ThreadPoolExecutor) -> None:
    result = stored(pool, PixelCache(None, disk_bytes=0, memory_bytes=2**24))
    result.read(ALL)[:] = 0
    result.read(ALL, Views(np.zeros((len(ALL), 2)), ALL >= 0))[:] = 0
    np.testing.assert_array_equal(result.read(ALL), eager())


def test_a_dataset_larger_than_the_cache_keeps_the_same_part_of_itself(
    pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Half of it fits; in every epoch about that much is found, although all of it went by."""
    cache = PixelCache(tmp_path, disk_bytes=16 * 12 * 4096, memory_bytes=0)
    flat = Geometry(36, "bilinear", 1.0, "center")  # 3,920 bytes with its header: one block a picture
    blobs = {hashlib.sha256(data).hexdigest(): data for data in (picture(seed, 36, 36) for seed in range(400))}
    read: list[str] = []

    def reading(sha256: str) -> bytes:
        read.append(sha256)
        return blobs[sha256]

    result = stored(pool, cache, read=reading, sums=list(blobs), geometry=flat)
    per_epoch = []
    for epoch in range(4):
        read.clear()
        for batch in np.array_split(np.random.default_rng(epoch).permutation(400), 10):
            result.read(batch)
        per_epoch.append(len(read))
    assert per_epoch[0] == 400
    assert max(per_epoch[1:]) < 300
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if len(path.name) == 64) <= 16 * 12 * 4096


def test_memory_is_bounded_whatever_the_dataset(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """A thousand pictures of 150 kB go by; 16 MB may stay."""
    blobs: dict[str, bytes] = {}
    for seed in range(1000):
        data = io.BytesIO()
        Image.new("RGB", (64, 64), (seed % 251, seed // 251, 7)).save(data, "BMP")
        blobs[hashlib.sha256(data.getvalue()).hexdigest()] = data.getvalue()
    cache = PixelCache(tmp_path, disk_bytes=2**24, memory_bytes=2**24)
    large = Geometry(224, "nearest", 1.0, "center")
    result = stored(pool, cache, read=blobs.__getitem__, sums=list(blobs), geometry=large)
    result = StoredImages(result.sums, result.decoder, dataset_size=1)  # every picture is let in
    process = psutil.Process()
    with closing(prefetch(result, np.array_split(np.arange(1000), 60), None)) as batches:
        next(batches)
        before = process.memory_info().rss
        most = max(process.memory_info().rss for _ in batches)
    assert most - before < 70 * 2**20
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*")) <= 2**24 + 2**17


# --- prefetch ---------------------------------------------------------------------------------------------------------


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_come_in_order_with_each_pictures_view(pool: ThreadPoolExecutor) -> None:
    result, order = stored(pool), np.random.default_rng(2).permutation(ALL)
    views = augment.draw("crop", len(ALL), torch.Generator().manual_seed(0))
    assert views is not None
    parts = [part for part in np.array_split(order, 7) if len(part)]
    for part, batch in zip(parts, prefetch(result, parts, views), strict=True):
        np.testing.assert_array_equal(batch, result.read(part, views.take(part)))
    assert not reading_threads()
    assert list(prefetch(result, [], None)) == []


def test_the_next_batches_are_read_while_one_is_being_fitted(pool: ThreadPoolExecutor) -> None:
    read, third, fourth = Counted(), threading.Event(), threading.Event()

    def reading(sha256: str) -> bytes:
        if sha256 == SUMS[2]:
            third.set()
        if sha256 == SUMS[3]:
            fourth.set()
        return read(sha256)

    drawn: list[int] = []
    parts = (drawn.append(i) or ALL[i : i + 1] for i in range(6))  # type: ignore[func-returns-value]
    with closing(prefetch(stored(pool, read=reading), parts, None)) as batches:
        next(batches)
        assert third.wait(SOON_S)
        assert drawn == [0, 1, 2]  # two ahead, no more
        next(batches)
        assert fourth.wait(SOON_S)


def test_stopping_early_leaks_no_thread_and_reads_no_further(pool: ThreadPoolExecutor) -> None:
    class EnoughError(Exception):
        pass

    def fit_until(read: Counted, end: Callable[[], None]) -> None:
        with closing(prefetch(stored(pool, read=read), [ALL[i : i + 1] for i in ALL], None)) as batches:
            for number, _ in enumerate(batches):
                assert reading_threads()
                if number == 1:
                    end()
                    return

    def explode() -> None:
        raise EnoughError

    for end in (lambda: None, explode):
        read = Counted()
        try:
            fit_until(read, end)
        except EnoughError:
            assert end is explode
        assert not reading_threads()
        assert len(read.times) <= 4


def test_closing_waits_for_what_is_being_read_and_drops_what_is_not(pool: ThreadPoolExecutor) -> None:
    read, second, go_on = Counted(), threading.Event(), threading.Event()

    def reading(sha256: str) -> bytes:
        if sha256 == SUMS[1]:
            second.set()
            assert go_on.wait(SOON_S)
        return read(sha256)

    batches = prefetch(stored(pool, read=reading), [ALL[i : i + 1] for i in range(6)], None)
    next(batches)
    assert second.wait(SOON_S)
    closer = threading.Thread(target=batches.close)
    closer.start()
    while not batches.gi_running:
        time.sleep(0.001)
    time.sleep(0.1)  # what is queued is dropped in microseconds; then it waits
    assert closer.is_alive()
    go_on.set()
    closer.join(SOON_S)
    assert not reading_threads()
    assert set(read.times) == set(SUMS[:2])


def test_a_picture_that_has_vanished_is_an_error_at_its_batch(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """A real dataset, deleted while it is being read: what is cached is still there, the rest is NotFound."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, data in enumerate(BLOBS.values()):
            archive.writestr(f"{number % 2}/{number}.png", data)
    store = DatasetStore(tmp_path / "home", max_images=100, max_unpacked_bytes=2**24, max_image_pixels=10**6)
    dataset = store.ingest(tmp_path / "a.zip")
    cache = caches(tmp_path / "cache")["disk"]
    result = stored(pool, cache, read=store.read, sums=[example.sha256 for example in dataset.examples])
    parts = np.array_split(ALL, 6)
    kept = [result.read(part) for part in parts[:3]]
    store.delete(dataset.id)
    batches = prefetch(result, parts, None)
    for expected in kept:
        np.testing.assert_array_equal(next(batches), expected)
    with pytest.raises(NotFound) as caught:
        next(batches)
    assert caught.value.code == "dataset_not_found"
    assert not reading_threads()


def test_a_picture_that_cannot_be_decoded_is_an_error_of_its_batch(pool: ThreadPoolExecutor) -> None:
    result = stored(pool, read=lambda sha256: b"x" if sha256 == SUMS[7] else BLOBS[sha256])
    with pytest.raises(ServiceError) as caught:
        list(prefetch(result, [ALL], None))
    assert caught.value.code == "unsupported_image"
    np.testing.assert_array_equal(result.read(ALL[:7]), eager()[:7])


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_digest_names_the_pictures_their_order_and_their_cut(pool: ThreadPoolExecutor) -> None:
    result = stored(pool)
    assert result.digest == stored(pool, sums=list(SUMS)).digest
    part, order = result.take(np.array([4, 2])), np.array([2, 4])
    assert part.digest == stored(pool, sums=[SUMS[4], SUMS[2]]).digest
    others = [part, result.take(order), result.take(ALL[::-1]), result.take(ALL[:-1])]
    others.append(stored(pool, geometry=Geometry(56, "bicubic", 0.9, "center")))
    assert len({each.digest for each in [result, *others]}) == 6


def test_a_part_of_what_lies_in_memory_has_a_digest_of_its_own() -> None:
    named = InMemory(eager(), "abc")
    digests = {named.digest, named.take(ALL[:3]).digest, named.take(ALL[1:3]).digest}
    assert len(digests) == 3
    assert None not in digests
    assert named.take(ALL[:3]).digest == named.take(ALL[:3].astype(np.int32)).digest
    assert InMemory(eager()).take(ALL[:3]).digest is None
