"""What both clients send of data sets: folders, archives, pipes, and large files in pieces."""

from __future__ import annotations

import io
import os
import threading
import tracemalloc
import zipfile
from math import ceil
from pathlib import Path

import pytest

import lensrack
from lensrack import _uploads
from tests.client.scripted_rack import Rack, Told, problem
from tests.client.ways import PIXELS, Make, in_process_and_sockets, over_sockets


class TestDatasets:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        root = tmp_path / "bottles"
        for label, count in (("glass", 2), ("metal", 1)):
            (root / label).mkdir(parents=True)
            for index in range(count):
                (root / label / f"{index}.jpg").write_bytes(PIXELS + bytes([index]))
        (root / ".hidden").write_text("not for anyone")
        (root / "glass" / ".DS_Store").write_text("neither")
        (root / "metal" / "link.jpg").symlink_to(root / "glass" / "0.jpg")
        (root / "looped").symlink_to(root)
        return root

    @in_process_and_sockets
    def test_a_folder_is_packed(self, make: Make, rack: Rack, folder: Path) -> None:
        seen: list[tuple[int, int | None]] = []
        dataset = make().datasets.upload(folder, progress=lambda sent, total: seen.append((sent, total)))
        [asked] = rack.asked
        assert (asked.params, asked.headers["content-type"]) == ({"name": "bottles"}, "application/zip")
        with zipfile.ZipFile(io.BytesIO(asked.body)) as archive:
            assert archive.namelist() == ["glass/0.jpg", "glass/1.jpg", "metal/0.jpg"]
            assert archive.read("glass/1.jpg") == PIXELS + b"\x01"
            assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        assert [file.name for file in dataset.skipped] == ["looped", "metal/link.jpg", "glass/broken.jpg"]
        assert seen[0] == (0, len(asked.body))
        assert seen[-1] == (len(asked.body), len(asked.body))

    def test_the_same_folder_gives_the_same_bytes(self, make: Make, rack: Rack, folder: Path) -> None:
        make().datasets.upload(folder, name="first")
        os.utime(folder / "glass" / "0.jpg", (1, 1))
        make().datasets.upload(str(folder), name="second")
        assert rack.asked[0].body == rack.asked[1].body
        assert rack.asked[1].params == {"name": "second"}

    def test_names_are_packed_as_they_are(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        names = ["Ka\u0308fer", "K\u00e4fer", "me\u200cn", "a  b "]
        for name in names:
            (tmp_path / "set" / name).mkdir(parents=True)
            (tmp_path / "set" / name / "1.jpg").write_bytes(PIXELS)
        make().datasets.upload(tmp_path / "set", label_column="kind")
        with zipfile.ZipFile(io.BytesIO(rack.asked[-1].body)) as archive:
            assert {*archive.namelist()} == {f"{name}/1.jpg" for name in names}
        assert rack.asked[-1].params == {"name": "set", "label_column": "kind"}
        (tmp_path / "set" / "a\\b").mkdir()
        (tmp_path / "set" / "a\\b" / "1.jpg").write_bytes(PIXELS)
        with pytest.raises(lensrack.InvalidInput, match="contains a backslash; rename"):
            make().datasets.upload(tmp_path / "set")

    def test_archives_travel_as_they_are(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        client = make()
        archives = {
            "a.zip": (b"PK\x03\x04 and more", "application/zip"),
            "a.tar.gz": (b"\x1f\x8b and more", "application/gzip"),
            "a.parquet": (b"PAR1 and more", "application/vnd.apache.parquet"),
            "a.npz": (b"PK\x03\x04 and more", "application/zip"),
            "a.tar.zst": (b"\x28\xb5\x2f\xfd and more", "application/zstd"),
            "a.tar.bz2": (b"BZh91AY&SY and more", "application/octet-stream"),
            "a.tar.xz": (b"\xfd7zXZ\0 and more", "application/octet-stream"),
            "a.tar": (bytes(257) + b"ustar" + bytes(250), "application/x-tar"),
        }
        for name, (data, kind) in archives.items():
            (tmp_path / name).write_bytes(data)
            client.datasets.upload(tmp_path / name)
            asked = rack.asked[-1]
            assert (asked.body, asked.headers["content-type"], asked.params) == (data, kind, {"name": "a"})

    def test_a_retry_starts_from_the_beginning(self, make: Make, rack: Rack) -> None:
        rack.misbehave("/datasets", problem(503, "busy", **{"Retry-After": "0"}))
        file = io.BytesIO(b"skipped" + b"PK\x03\x04 and more")
        file.seek(7)
        make().datasets.upload(file)
        assert [asked.body for asked in rack.asked] == [b"PK\x03\x04 and more"] * 2

    @over_sockets
    def test_a_pipe_is_sent_once(self, make: Make, rack: Rack) -> None:
        data = b"PK\x03\x04" + os.urandom(600_000)
        rack.misbehave("/datasets", problem(503, "busy", **{"Retry-After": "0"}))
        for outcome in (lensrack.UnavailableError, None):
            reading, writing = os.pipe()
            writer = threading.Thread(target=_fill, args=(writing, data))
            writer.start()
            with open(reading, "rb") as pipe:
                if outcome:
                    with pytest.raises(outcome):
                        make().datasets.upload(pipe)
                else:
                    make().datasets.upload(pipe, name="from a pipe")
            writer.join()
        assert len(rack.asked) == 2
        assert (rack.asked[1].body, rack.asked[1].headers["transfer-encoding"]) == (data, "chunked")

    @over_sockets
    def test_memory_stays_bounded(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        size = 48 * 2**20
        with (tmp_path / "large.zip").open("wb") as file:
            file.write(b"PK\x03\x04")
            file.truncate(size)
        client = make()
        client.datasets.list()  # the connection and the models are there
        tracemalloc.start()
        client.datasets.upload(tmp_path / "large.zip")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(asked.body_bytes for asked in rack.asked if asked.method == "PATCH") == size
        assert peak < 6 * 2**20

    @over_sockets
    def test_a_file_that_shrinks_is_told(self, make: Make, tmp_path: Path) -> None:
        path = tmp_path / "large.zip"
        path.write_bytes(b"PK\x03\x04" + bytes(2**20))

        def cut(sent: int, total: int | None) -> None:
            os.truncate(path, 300_000)

        with pytest.raises(lensrack.InvalidInput, match="shrank while it was sent: expected 1048580 bytes, got"):
            make().datasets.upload(path, progress=cut)

    def test_what_is_no_dataset(self, make: Make, rack: Rack, tmp_path: Path) -> None:
        client = make()
        (tmp_path / "notes.txt").write_text("no archive")
        (tmp_path / "empty" / "glass").mkdir(parents=True)
        for path, why in (
            ("notes.txt", "notes.txt is not an archive: expected a folder"),
            ("empty", "holds no files: expected a folder of class folders"),
            ("missing", "No such file"),
        ):
            with pytest.raises(lensrack.InvalidInput, match=why):
                client.datasets.upload(tmp_path / path)
        assert not rack.asked

    def test_more_for_a_dataset(self, make: Make, rack: Rack, folder: Path) -> None:
        assert make().datasets.add(folder, "d1").parent == "d1"
        assert rack.asked[-1].params == {"parent": "d1"}
        make().datasets.add(folder, "d1", name="more")
        assert rack.asked[-1].params == {"parent": "d1", "name": "more"}

    def test_the_rest(self, make: Make, rack: Rack) -> None:
        datasets = make().datasets
        assert [dataset.id for dataset in datasets.list()] == ["d1"]
        assert datasets.get("d1").labels == ["glass", "metal"]
        datasets.delete("d1")
        assert (rack.asked[-1].method, rack.asked[-1].path) == ("DELETE", "/datasets/d1")


class TestUploadsInPieces:
    DATA = b"PK\x03\x04" + bytes(range(256)) * 400  # a good hundred kB

    @pytest.fixture(autouse=True)
    def _small_and_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_uploads, "PIECE_BYTES", 30_000)
        monkeypatch.setattr(_uploads, "PAUSE_S", 0.01)

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "large.zip"
        path.write_bytes(self.DATA)
        return path

    @in_process_and_sockets
    def test_all_of_them_arrive_in_order(self, make: Make, rack: Rack, file: Path) -> None:
        seen: list[tuple[int, int | None]] = []
        begun: list[str] = []
        dataset = make().datasets.upload(
            file, progress=lambda sent, total: seen.append((sent, total)), on_upload=begun.append
        )
        assert (dataset.id, begun) == ("d1", ["u1"])
        assert rack.uploads["u1"].body == self.DATA
        assert [asked.headers["upload-offset"] for asked in rack.to("/uploads/u1")] == ["0", "30000", "60000", "90000"]
        assert {asked.headers["tus-resumable"] for asked in rack.to("/uploads/u1")} == {"1.0.0"}
        assert rack.asked[-1].params == {"upload": "u1", "name": "large"}
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == ((0, len(self.DATA)), (len(self.DATA), len(self.DATA)))

    @over_sockets
    def test_a_broken_line_goes_on_where_the_server_stands(self, make: Make, rack: Rack, file: Path) -> None:
        breaks = {
            30_000: Told(200, b"", drop=True),
            60_000: problem(503, "shutting_down", **{"Retry-After": "0"}),
            90_000: problem(409, "upload_busy"),
        }

        told: list[int] = []

        def at(sent: int, total: int | None) -> None:
            told.append(sent)
            if sent in breaks and told[-2:] == [sent, sent]:  # sent, and acknowledged
                rack.misbehave("/uploads/u1", breaks.pop(sent))

        make(max_retries=0).datasets.upload(file, progress=at)
        assert not breaks
        assert rack.uploads["u1"].body == self.DATA
        assert [asked.method for asked in rack.to("/uploads/u1")].count("HEAD") == 3
        assert len(rack.to("/uploads")) == len(rack.to("/datasets")) == 1

    def test_a_piece_that_came_although_its_answer_did_not_is_not_sent_again(
        self, make: Make, rack: Rack, file: Path
    ) -> None:
        told: list[int] = []

        def at(sent: int, total: int | None) -> None:
            told.append(sent)
            if told.count(30_000) == 2:  # sent, and acknowledged
                rack.uploads["u1"].offset, rack.uploads["u1"].body = 45_000, self.DATA[:45_000]
                told.append(30_000)

        make().datasets.upload(file, progress=at)
        assert rack.uploads["u1"].body == self.DATA
        assert [asked.method for asked in rack.to("/uploads/u1")] == ["PATCH", "PATCH", "HEAD", "PATCH", "PATCH"]

    def test_a_line_that_stays_broken_is_given_up_and_can_be_taken_up_again(
        self, make: Make, rack: Rack, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_uploads, "OUTAGE_S", 0.05)
        begun: list[str] = []

        def at(sent: int, total: int | None) -> None:
            if sent == 60_000:
                rack.misbehave("/uploads/u1", *[problem(503, "shutting_down", **{"Retry-After": "0"})] * 500)

        with pytest.raises(lensrack.UnavailableError):
            make(max_retries=0).datasets.upload(file, progress=at, on_upload=begun.append)
        rack.behave()
        asked, left = len(rack.asked), len(self.DATA) - rack.uploads["u1"].offset
        assert 0 < left < len(self.DATA)
        assert make().datasets.upload(file, resume=begun[0]).id == "d1"
        assert rack.uploads["u1"].body == self.DATA
        assert [one.method for one in rack.asked[asked:]] == ["HEAD", *["PATCH"] * ceil(left / 30_000), "POST"]

    def test_another_file_does_not_go_on_with_an_upload(self, make: Make, rack: Rack, file: Path) -> None:
        make().datasets.upload(file)
        client = make()
        for other in (self.DATA + b"!", self.DATA[:-1] + b"!"):
            file.write_bytes(other)
            with pytest.raises(lensrack.InvalidInput, match="is of another file"):
                client.datasets.upload(file, resume="u1")
        with pytest.raises(lensrack.NotFoundError):
            client.datasets.upload(file, resume="u7")
        reading, writing = os.pipe()
        writer = threading.Thread(target=_fill, args=(writing, self.DATA))
        writer.start()
        with open(reading, "rb") as pipe:
            with pytest.raises(lensrack.InvalidInput, match="a pipe cannot start in its middle"):
                client.datasets.upload(pipe, resume="u1")
            pipe.read()
        writer.join()

    def test_what_cannot_get_better_is_told_at_once(self, make: Make, rack: Rack, file: Path) -> None:
        rack.misbehave("/uploads/u1", problem(507, "disk_full"))
        with pytest.raises(lensrack.ServerError, match="disk_full"):
            make().datasets.upload(file)
        rack.misbehave("/uploads", problem(413, "body_too_large"))
        with pytest.raises(lensrack.TooLargeError):
            make().datasets.upload(file)
        assert [asked.method for asked in rack.asked] == ["POST", "PATCH", "POST"]

    @over_sockets
    def test_the_last_answer_may_be_lost_too(self, make: Make, rack: Rack, file: Path) -> None:
        rack.misbehave("/datasets", *[Told(201, b"{", drop=True)] * 3)
        assert make(max_retries=1).datasets.add(file, "d1").parent == "d1"
        assert [asked.params for asked in rack.to("/datasets")] == [{"upload": "u1", "parent": "d1"}] * 4
        assert rack.uploads["u1"].body == self.DATA


def _fill(writing: int, data: bytes) -> None:
    with open(writing, "wb") as pipe:
        pipe.write(data)
