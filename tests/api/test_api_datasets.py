"""Datasets over a real socket into the real dataset store."""

from __future__ import annotations

import io
import socket
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from lensrack import wire
from server.api import receiving
from tests.api.api_server import Api, assert_problem, serving
from tests.serving.floor import png

ZIP = {"content-type": "application/zip"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path, max_dataset_bytes=40_000_000) as api:
        yield api
        assert leftovers(api) == []


def leftovers(api: Api) -> list[Path]:
    return list((api.services.settings.datasets_dir / receiving.FOLDER).glob("*"))


FILES = {f"train/{label}/{i}.png": png(grey + i) for label, grey in (("cat", 10), ("dog", 90)) for i in range(3)}


def zipped(files: dict[str, bytes] = FILES) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def as_parquet() -> bytes:
    out = pa.BufferOutputStream()
    images = [{"bytes": data} for data in FILES.values()]
    pq.write_table(pa.table({"image": images, "label": [name.split("/")[1] for name in FILES]}), out)
    return bytes(out.getvalue())


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("application/zip", zipped()),
        ("application/octet-stream", zipped()),
        ("application/x-tar", tarred("w")),
        ("application/gzip", tarred("w:gz")),
        ("application/x-gzip", tarred("w:gz")),
        ("application/zstd", zstd.compress(tarred("w"))),
        ("application/vnd.apache.parquet", as_parquet()),
    ],
)
def test_an_archive_becomes_a_dataset(api: Api, kind: str, data: bytes):
    answer = api.http.post("/datasets?name=pets", content=data, headers={"content-type": kind})
    assert answer.status_code == 201, answer.text
    told = wire.Dataset.model_validate(answer.json())
    assert answer.headers["location"] == f"/datasets/{told.id}"
    assert (told.name, told.labels, told.images) == ("pets", ["cat", "dog"], 6)
    assert told.splits["train"] == {"cat": 3, "dog": 3}
    assert told.report is not None
    assert told.report.formats == {"png": 6}
    assert "few_images" in [warning.code for warning in told.report.warnings]
    assert wire.Dataset.model_validate(api.http.get(answer.headers["location"]).json()) == told
    assert [each["id"] for each in api.http.get("/datasets").json()["datasets"]] == [told.id]
    assert api.http.delete(f"/datasets/{told.id}").status_code == 204
    assert_problem(api.http.get(f"/datasets/{told.id}"), 404, "dataset_not_found")
    assert_problem(api.http.delete(f"/datasets/{told.id}"), 404, "dataset_not_found")


def test_unreadable_pictures_are_listed(api: Api):
    answer = api.http.post("/datasets", content=zipped({**FILES, "train/cat/broken.png": b"no picture"}), headers=ZIP)
    (skipped,) = wire.Dataset.model_validate(answer.json()).skipped
    assert skipped.name == "train/cat/broken.png"
    assert skipped.reason


def test_refusals(api: Api):
    assert (
        "0 bytes" in assert_problem(api.http.post("/datasets", content=b"", headers=ZIP), 400, "bad_archive")["detail"]
    )
    assert_problem(api.http.post("/datasets", content=b"no archive at all", headers=ZIP), 400, "bad_archive")
    assert_problem(
        api.http.post("/datasets", content=zipped({"../evil/a.png": png()}), headers=ZIP), 400, "bad_archive"
    )
    plain = api.http.post("/datasets", content=zipped(), headers={"content-type": "text/plain"})
    assert_problem(plain, 415, "unsupported_media_type")
    assert_problem(api.http.post(f"/datasets?name={'x' * 201}", content=zipped(), headers=ZIP), 422, "invalid_request")
    assert api.http.get("/datasets").json() == {"datasets": []}


def test_too_large_leaves_nothing(api: Api):
    def endless() -> Iterator[bytes]:
        for _ in range(45):
            yield b"x" * 1_000_000

    assert_problem(api.http.post("/datasets", content=endless(), headers=ZIP), 413, "body_too_large")


def test_a_client_gone_midway_leaves_nothing(api: Api):
    head = b"POST /datasets HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/zip\r\nContent-Length: 5000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", api.port)) as sock:
        sock.sendall(head + b"x" * 2_500_000)
        deadline = time.monotonic() + 10
        while not [path for path in leftovers(api) if path.stat().st_size > 1_000_000]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    deadline = time.monotonic() + 10
    while leftovers(api):
        assert time.monotonic() < deadline, "the half upload is still there"
        time.sleep(0.01)


def test_an_upload_goes_to_the_disk_and_not_into_memory(api: Api):
    """Client and server share this process: the client sends pieces of a megabyte and keeps none."""

    def pieces() -> Iterator[bytes]:
        for _ in range(38):
            yield bytes(1_000_000)

    tracemalloc.start()
    try:
        answer = api.http.post("/datasets", content=pieces(), headers=ZIP)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_problem(answer, 400, "bad_archive")
    assert peak < 12_000_000
