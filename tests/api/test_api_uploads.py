"""Resumable uploads over a real socket: what was acknowledged stays, whatever happens to the connection."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lensrack import wire
from server.clock import WallClock
from server.datasets.upload_store import UploadStore
from server.errors import Conflict, DiskFull, NotFound, Unavailable
from tests.api.api_server import Api, assert_problem, read_response, serving
from tests.api.test_api_datasets import FILES, zipped

PIECE = {"Content-Type": "application/offset+octet-stream", "Tus-Resumable": "1.0.0"}
NOBODY = "0" * 32


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path, max_dataset_bytes=40_000_000) as api:
        yield api


def folder(api: Api) -> Path:
    return api.services.settings.datasets_dir / "resumable"


def begin(api: Api, length: int, **headers: str) -> str:
    answer = api.http.post("/uploads", headers={"Upload-Length": str(length), **headers})
    assert answer.status_code == 201, answer.text
    return answer.headers["Location"]


def patch(api: Api, where: str, offset: int, data: bytes | Iterator[bytes]) -> httpx.Response:
    return api.http.patch(where, content=data, headers={**PIECE, "Upload-Offset": str(offset)})


def offset(api: Api, where: str) -> int:
    answer = api.http.head(where)
    assert answer.status_code == 200
    return int(answer.headers["Upload-Offset"])


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def hanging(api: Api, where: str, at: int, announced: int, data: bytes) -> socket.socket:
    """A PATCH that announces more than it sends, and stays connected."""
    sock = socket.create_connection(("127.0.0.1", api.port), timeout=20)
    head = f"PATCH {where} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {PIECE['Content-Type']}\r\n"
    sock.sendall(f"{head}Upload-Offset: {at}\r\nContent-Length: {announced}\r\n\r\n".encode() + data)
    return sock


def test_pieces_become_a_dataset(api: Api) -> None:
    archive = zipped()
    created = api.http.post(
        "/uploads", headers={"Upload-Length": str(len(archive)), "Upload-Metadata": "name cGV0cw=="}
    )
    told, where = wire.Upload.model_validate(created.json()), created.headers["Location"]
    assert (where, told.length, told.offset) == (f"/uploads/{told.id}", len(archive), 0)
    assert told.expires_at > time.time() + 80_000
    for start in range(0, len(archive), 500):
        answer = patch(api, where, start, archive[start : start + 500])
        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["Upload-Offset"] == str(min(start + 500, len(archive)))
        assert answer.headers["Tus-Resumable"] == "1.0.0"
        assert answer.headers["Upload-Expires"].endswith("GMT")
    seen = api.http.head(where).headers
    assert (seen["Upload-Offset"], seen["Upload-Length"]) == (str(len(archive)), str(len(archive)))
    assert (seen["Cache-Control"], seen["Upload-Metadata"]) == ("no-store", "name cGV0cw==")
    stored = api.http.post(f"/datasets?upload={told.id}&name=pets")
    dataset = wire.Dataset.model_validate(stored.json())
    assert (stored.status_code, dataset.name, dataset.images) == (201, "pets", len(FILES))
    assert stored.headers["Location"] == f"/datasets/{dataset.id}"


def test_what_the_server_speaks(api: Api) -> None:
    answer = api.http.options("/uploads")
    assert (answer.status_code, answer.headers["Tus-Version"]) == (204, "1.0.0")
    assert answer.headers["Tus-Extension"] == "creation,termination,expiration"
    assert answer.headers["Tus-Max-Size"] == "40000000"
    refused = api.http.post("/uploads", headers={"Tus-Resumable": "2.0.0", "Upload-Length": "5"})
    assert_problem(refused, 412, "precondition_failed")
    assert refused.headers["Tus-Version"] == "1.0.0"
    missing = api.http.head(f"/uploads/{NOBODY}")
    assert (missing.status_code, missing.headers["Tus-Resumable"]) == (404, "1.0.0")


def test_the_same_whole_upload_is_the_same_dataset_however_often_it_is_asked_for(api: Api) -> None:
    archive = zipped()
    where = begin(api, len(archive))
    patch(api, where, 0, archive)
    ask = f"/datasets?upload={where.rpartition('/')[2]}"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: httpx.post(api.url + ask, timeout=20), range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert api.http.post(ask).json() == answers[0].json()
    assert [path.stat().st_size for path in folder(api).glob("*/data")] == [0]
    assert_problem(patch(api, where, 0, archive), 409, "upload_finished")
    assert api.http.delete(where).status_code == 204
    assert_problem(api.http.post(ask), 404, "upload_not_found")
    assert list(folder(api).iterdir()) == []


def test_an_upload_adds_to_a_dataset(api: Api) -> None:
    parent = api.http.post("/datasets", content=zipped(), headers={"content-type": "application/zip"}).json()
    some = dict(list(FILES.items())[:1])
    more = zipped({**some, "train/cat/new.png": FILES["train/cat/0.png"] + b"another"})
    assert_problem(api.http.post("/datasets?parent=ffffffff", content=more), 404, "dataset_not_found")
    where = begin(api, len(more))
    patch(api, where, 0, more)
    child = api.http.post(f"/datasets?upload={where.rpartition('/')[2]}&parent={parent['id']}").json()
    assert (child["parent"], child["images"]) == (parent["id"], 7)
    assert api.http.delete(f"/datasets/{parent['id']}").status_code == 204
    assert api.http.get(f"/datasets/{child['id']}").json() == child


def test_what_came_before_the_connection_broke_is_kept(api: Api) -> None:
    archive = zipped({**FILES, "train/cat/noise.png": os.urandom(3_000_000)})
    where = begin(api, len(archive))
    with hanging(api, where, 0, len(archive), archive[:2_000_000]):
        until(lambda: offset(api, where) > 1_000_000, "the first bytes are there")

    def go_on() -> bool:
        reached = offset(api, where)
        return patch(api, where, reached, archive[reached:]).status_code == 204

    until(go_on, "the rest follows")
    assert api.http.post(f"/datasets?upload={where.rpartition('/')[2]}").status_code == 201


def test_two_writers_at_once(api: Api) -> None:
    data = os.urandom(3_000_000)
    where = begin(api, len(data))
    with hanging(api, where, 0, len(data), data[:2_000_000]) as first:
        until(lambda: offset(api, where) > 1_000_000, "the first writes")
        assert_problem(patch(api, where, 0, data), 409, "upload_busy")
        assert_problem(api.http.delete(where), 409, "upload_busy")
        id_ = where.rpartition("/")[2]
        assert_problem(api.http.post(f"/datasets?upload={id_}"), 409, "upload_busy")
        first.sendall(data[2_000_000:])
        assert b" 204 " in read_response_head(first)
    assert offset(api, where) == len(data)
    assert (folder(api) / id_ / "data").read_bytes() == data


def read_response_head(sock: socket.socket) -> bytes:
    got = b""
    while b"\r\n\r\n" not in got and (chunk := sock.recv(65536)):
        got += chunk
    return got


def test_refusals_name_what_was_expected(api: Api) -> None:
    where = begin(api, 10)
    wrong = assert_problem(patch(api, where, 3, b"x"), 409, "upload_offset_conflict")
    assert (wrong["expected"], wrong["actual"]) == (0, 3)
    assert "expected 0" in wrong["detail"]
    assert "10 bytes" in assert_problem(patch(api, where, 0, b"x" * 11), 413, "body_too_large")["detail"]
    assert offset(api, where) == 0
    assert_problem(patch(api, where, 0, iter([b"x" * 8, b"y" * 8])), 413, "body_too_large")  # its length untold
    assert offset(api, where) == 10
    assert_problem(api.http.patch(where, content=b"x", headers={"Upload-Offset": "10"}), 415, "unsupported_media_type")
    assert_problem(api.http.patch(where, content=b"x", headers=PIECE), 422, "invalid_request")
    for length in ("", "-1", "1.5", "x", "9" * 19):
        assert_problem(api.http.post("/uploads", headers={"Upload-Length": length}), 422, "invalid_request")
    assert_problem(api.http.post("/uploads", headers={"Upload-Length": "40000001"}), 413, "body_too_large")
    for name in (NOBODY, "x", "%2e%2e%2fdatasets"):
        assert api.http.head(f"/uploads/{name}").status_code == 404
    assert_problem(api.http.delete(f"/uploads/{NOBODY}"), 404, "upload_not_found")
    assert_problem(patch(api, f"/uploads/{NOBODY}", 0, b"x"), 404, "upload_not_found")
    assert len(list(folder(api).iterdir())) == 1


def test_what_is_not_whole_or_no_archive_becomes_no_dataset(api: Api) -> None:
    where = begin(api, 20)
    ask = f"/datasets?upload={where.rpartition('/')[2]}"
    patch(api, where, 0, b"no archive")
    half = assert_problem(api.http.post(ask), 409, "upload_incomplete")
    assert (half["expected"], half["actual"]) == (20, 10)
    assert_problem(api.http.post(ask, content=zipped()), 422, "invalid_request")
    patch(api, where, 10, b" whatever ")
    assert_problem(api.http.post(ask), 400, "bad_archive")
    assert_problem(api.http.post(ask), 404, "upload_not_found")
    assert list(folder(api).iterdir()) == []


def test_a_silent_piece_lets_go(tmp_path: Path) -> None:
    """A line that went dead without a word must not keep its own successor out."""
    with serving(tmp_path, upload_silence_s=0.3) as api:
        where = begin(api, 10)
        with hanging(api, where, 0, 10, b"12345") as dead:
            until(lambda: offset(api, where) == 5, "what came is kept")
            assert b" 408 " in read_response(dead)
        assert patch(api, where, 5, b"67890").status_code == 204


def test_abandoned_uploads_are_swept(api: Api) -> None:
    old, young = begin(api, 10), begin(api, 10)
    patch(api, old, 0, b"12345")
    age(folder(api) / old.rpartition("/")[2])
    assert api.http.head(old).status_code == 404
    assert_problem(patch(api, old, 5, b"67890"), 404, "upload_not_found")
    begin(api, 10)
    assert not (folder(api) / old.rpartition("/")[2]).exists()
    assert offset(api, young) == 0


def age(upload: Path) -> None:
    for path in (*upload.iterdir(), upload):
        os.utime(path, (1, 1))


def test_an_upload_goes_to_the_disk_and_not_into_memory(api: Api) -> None:
    where = begin(api, 38_000_000)
    tracemalloc.start()
    try:
        answer = patch(api, where, 0, (bytes(1_000_000) for _ in range(38)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.headers["Upload-Offset"] == "38000000"
    assert peak < 12_000_000


# --- the store itself -------------------------------------------------------------------------------------------------


def opened(root: Path, **options: Any) -> UploadStore:
    return UploadStore(root, **{"max_bytes": 10_000_000, "expiry_s": 3600.0, **options})


def test_a_start_sweeps_what_is_old_and_keeps_what_is_not(tmp_path: Path) -> None:
    store = opened(tmp_path)
    old, young, busy = (store.create(10) for _ in range(3))
    part = store.open(busy.id)
    for upload in (old, busy):
        age(tmp_path / upload.id)
    (tmp_path / "half-made").mkdir()
    age(tmp_path / "half-made")
    assert opened(tmp_path).get(young.id).offset == 0
    assert {path.name for path in tmp_path.iterdir()} == {young.id, busy.id}
    part.append(b"12345")
    assert part.close() == 5
    assert opened(tmp_path).get(busy.id).offset == 5


@pytest.mark.parametrize("jump_s", [-1e8, -7200.0, 7200.0, 1e8])
def test_a_clock_that_is_set_ends_no_upload_that_goes_on(tmp_path: Path, jump_s: float) -> None:
    wall, steady = [time.time()], [5.0]
    store = opened(tmp_path, clock=WallClock(lambda: wall[0], lambda: steady[0]))
    upload = store.create(10)
    wall[0] += jump_s
    later = store.create(10)
    os.utime(tmp_path / later.id / "data", (wall[0], wall[0]))  # as the kernel would, whose clock it is
    for _ in range(3):
        store.sweep()
        assert (store.get(upload.id).offset, store.get(later.id).offset) == (0, 0)
        wall[0], steady[0] = wall[0] + 1000, steady[0] + 1000
    part = store.open(upload.id)
    part.append(b"12345")
    assert part.close() == 5
    if jump_s > 0:
        wall[0], steady[0] = wall[0] + 1e9, steady[0] + 1e9
        store.sweep()
        assert list(tmp_path.iterdir()) == [], "in the end it is swept"


def test_a_writer_that_was_given_up_writes_no_more(tmp_path: Path) -> None:
    store = opened(tmp_path)
    upload = store.create(10)
    part = store.open(upload.id)
    part.append(b"12345")
    part.close()
    part.append(b"late")
    assert store.get(upload.id).offset == 5


def test_no_offset_is_told_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    real = os.fdatasync

    def flush(file: int) -> None:
        real(file)
        flushed.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fdatasync", flush)
    store = opened(tmp_path)
    upload = store.create(1000)
    part = store.open(upload.id)
    part.append(b"x" * 300)
    assert (store.get(upload.id).offset, flushed[-1]) == (300, 300)
    part.append(b"x" * 300)
    assert (part.close(), flushed[-1]) == (600, 600)

    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    part = store.open(upload.id)
    part.append(b"x")
    monkeypatch.setattr(os, "fdatasync", broken)
    for asked in (part.close, lambda: store.get(upload.id)):
        with pytest.raises(Unavailable):
            asked()


def test_a_failure_that_may_pass_leaves_the_upload(tmp_path: Path) -> None:
    store = opened(tmp_path)
    upload = store.create(0)

    def full(archive: Path) -> str:
        raise DiskFull("full")

    with pytest.raises(DiskFull):
        store.finish(upload.id, full)
    assert store.finish(upload.id, lambda archive: "d1") == "d1"
    assert store.finish(upload.id, full) == "d1"
    with pytest.raises(Conflict):
        store.open(upload.id)
    age(tmp_path / upload.id)
    with pytest.raises(NotFound):
        store.finish(upload.id, full)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "small-disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_upload_goes_on_when_there_is_room(small_disk: Path) -> None:
    store = opened(small_disk / "uploads")
    with pytest.raises(DiskFull, match="2000000 bytes does not fit"):
        store.create(2_000_000)
    upload = store.create(800_000)
    (small_disk / "other").write_bytes(bytes(500_000))
    data = os.urandom(800_000)
    part = store.open(upload.id)
    with pytest.raises(DiskFull):
        part.append(data)
    kept = part.close()
    assert 0 < kept < 800_000
    assert store.get(upload.id).offset == kept
    (small_disk / "other").unlink()
    part = store.open(upload.id)
    part.require(kept, 800_000 - kept)
    part.append(data[kept:])
    assert part.close() == 800_000
    assert (small_disk / "uploads" / upload.id / "data").read_bytes() == data
