"""Everything of ours that reads bytes of strangers, as a function of those bytes with what it may refuse them by, and
good inputs to begin from. Hypothesis tries them with the tests, atheris for as long as it is given."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from backports import zstd
from safetensors.numpy import save
from starlette.datastructures import Headers

from prompts_store import Bundle, BundleError
from prompts_store.alias import AliasBook
from prompts_store.errors import CorruptAliases
from server.api import raw_pixels
from server.datasets.dataset_store import DatasetStore
from server.datasets.formats import manifest
from server.engine.images.decode import Geometry, pixels
from server.errors import BadRequest, ServiceError, TooLarge, Unprocessable, UnsupportedMedia
from server.importing.checkpoint import Checkpoint
from server.serving.resolver import Ref
from tests.security import test_archive_attacks as archives
from tests.security import test_bad_images as images
from tests.security import test_bundle_attacks as bundles


@dataclass(frozen=True)
class Reader:
    """`read` may raise one of `refusals`; anything else that it does wrong, or raises, is a finding."""

    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]

    def survives(self, data: bytes) -> None:
        try:
            self.read(data)
        except self.refusals as refusal:
            detail = str(refusal)
            assert len(detail) < 2000, "a refusal must not repeat the attack"
            assert "/tmp" not in detail, "a refusal names no path of the server"


def read_bundle(data: bytes) -> None:
    """What is accepted is read back to the very bytes."""
    assert Bundle.parse(data).data == data


def read_checkpoint(data: bytes) -> None:
    checkpoint = Checkpoint.read([("x.pth", io.BytesIO(data))])
    for name in checkpoint.arrays:
        assert np.isfinite(checkpoint.floats(name)).all()


def read_image(data: bytes) -> None:
    assert pixels(data, Geometry(16, "bilinear", 0.9, "center"), max_pixels=1_000_000).shape == (16, 16, 3)


@cache
def datasets() -> tuple[DatasetStore, Path]:
    root = Path(tempfile.mkdtemp(prefix="lensrack-fuzz-"))
    return DatasetStore(root / "datasets", max_images=100, max_unpacked_bytes=2**20, max_image_pixels=10_000), root


def read_archive(data: bytes) -> None:
    """What is refused leaves nothing, what is accepted can be read."""
    store, root = datasets()
    archive = root / "archive"
    archive.write_bytes(data)
    before = {one.id for one in store.list()}
    try:
        found = store.ingest(archive)
    except Exception:
        assert {one.id for one in store.list()} == before
        raise
    if found.id not in before:
        store.delete(found.id)


def read_table(data: bytes) -> None:
    """As lines of JSON where it begins so, else as CSV."""
    table = manifest.read(("labels.jsonl" if data[:1] == b"{" else "labels.csv",), data, max_rows=1000)
    pictures = [("pets", "1.PNG"), ("2.png",)]
    assert len(manifest.places([table], pictures, [])[0]) == len(pictures)


def read_reference(data: bytes) -> None:
    for ref in Ref.parse_all(data.decode("utf-8", "replace")):
        assert "/" not in ref.task


def read_npy(data: bytes) -> None:
    for one in raw_pixels.read(data, Headers(), most=4):
        assert one.pixels.dtype == np.uint8


def read_aliases(data: bytes) -> None:
    AliasBook.from_json("fish", data).to_json()


def checkpoints() -> list[bytes]:
    arrays = {"head.weight": torch.ones(2, 3), "x": np.ones(2, np.float32), "label": "cat"}
    found = []
    for new in (True, False):
        file = io.BytesIO()
        torch.save(arrays, file, _use_new_zipfile_serialization=new)
        found.append(file.getvalue())
    return [*found, save({"head.weight": np.ones((2, 3), np.float32)})]


def packed() -> list[bytes]:
    tar = archives.tar_of()
    compressed = [gzip.compress(tar, mtime=0), zstd.compress(tar), bz2.compress(tar), lzma.compress(tar)]
    return [archives.named_zip("b\\9.png"), archives.unicode_path_zip("b/9.png"), tar, *compressed]


def npy(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(shape, np.uint8))
    return file.getvalue()


CSV = "sep=;\r\nid;breed\r\n/home/me/pets/1.png;Käfer\r\n2;NaN\r\n"
JSON_LINES = b'{"file_name": "1", "label": "cat"}\n{"file_name": "2.png", "label": NaN}\n'
ALIASES = b'{"live": {"revision": 1, "history": [{"name": "live", "targets": [{"version": "v", "weight": 1.0}], "revision": 1, "changed_at": 1.0}]}}'  # noqa: E501
READERS: dict[str, Reader] = {
    "bundle": Reader(read_bundle, (BundleError,), lambda: [bundles.GOOD.data]),
    "checkpoint": Reader(read_checkpoint, (Unprocessable,), checkpoints),
    "image": Reader(read_image, (BadRequest, TooLarge, UnsupportedMedia), lambda: list(images.FILES.values())),
    "archive": Reader(read_archive, (ServiceError,), packed),
    "table": Reader(read_table, (BadRequest,), lambda: [CSV.encode(), CSV.encode("utf-16"), JSON_LINES]),
    "reference": Reader(read_reference, (BadRequest,), lambda: [b"cats@live+canary", b"a.b-c@" + b"0" * 64]),
    "npy": Reader(read_npy, (BadRequest, Unprocessable), lambda: [npy((2, 4, 4, 3)), npy((4, 4, 3))]),
    "aliases": Reader(read_aliases, (CorruptAliases,), lambda: [ALIASES]),
}


if __name__ == "__main__":
    print(*READERS)
