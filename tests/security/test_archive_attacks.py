"""Malicious archives: each is refused with its reason, and the store's folder is left unchanged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from PIL import Image

from server.datasets.dataset_store import DatasetStore
from server.errors import BadRequest

MIB = 2**20


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 7)).save(out, "PNG")
    return out.getvalue()


GOOD = {f"{label}/{number}.png": picture(16 * number + shift) for shift, label in enumerate("ab") for number in (1, 2)}


def zip_of(*extra: tuple[zipfile.ZipInfo | str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Good pictures first, so that a refusal comes when something has been staged already."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in [*GOOD.items(), *extra]:
            archive.writestr(name, data)
    return out.getvalue()


def tar_of(*extra: tuple[tarfile.TarInfo, bytes], format_: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, data in GOOD.items():
            archive.addfile(tar_info(name, len(data)), io.BytesIO(data))
        for info, data in extra:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def zip_info(name: str, mode: int = 0o100644, **fields: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_with(name: str, data: bytes) -> bytes:
    return tar_of((tar_info(name, len(data)), data))


def named_zip(name: str) -> bytes:
    return zip_of((name, picture(200)))


def named_tar(name: str) -> bytes:
    data = picture(200)
    return tar_of((tar_info(name, len(data)), data))


def nul_zip() -> bytes:
    return zip_of(("a/x0y.png", b"x")).replace(b"a/x0y.png", b"a/x\0y.png")


def encrypted_zip() -> bytes:
    data = bytearray(zip_of(("a/secret.png", b"x")))
    local = data.rindex(b"PK\x03\x04")
    central = data.rindex(b"PK\x01\x02")
    data[local + 6] |= 1
    data[central + 8] |= 1
    return bytes(data)


def bzip2_zip() -> bytes:
    out = io.BytesIO(zip_of())
    with zipfile.ZipFile(out, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/packed.png", bytes(MIB))
    return out.getvalue()


def lying_zip() -> bytes:
    """Says that its member unpacks to ten bytes; it unpacks to eight million."""
    data = bytearray(zip_of(("a/bomb.bmp", bytes(8 * MIB))))
    size = struct.pack("<I", 10)
    data[data.rindex(b"PK\x03\x04") + 22 :][:4] = size
    local, central = data.rindex(b"PK\x03\x04"), data.rindex(b"PK\x01\x02")
    data[local + 22 : local + 26] = size
    data[central + 24 : central + 28] = size
    return bytes(data)


def overlapping_zip() -> bytes:
    """Two hundred directory entries of one kernel of packed bytes."""
    kernel = bytes(MIB)
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packed.compress(kernel) + packed.flush()
    crc = zlib.crc32(kernel)
    name = b"a/1.bmp"
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(body), len(kernel), len(name), 0) + name
    directory = b""
    for number in range(200):
        entry = f"a/{number}.bmp".encode()
        fields = (b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(body), len(kernel), len(entry), 0, 0, 0, 0, 0, 0)
        directory += struct.pack("<4s6H3I5H2I", *fields) + entry
    start = len(local) + len(body)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 200, 200, len(directory), start, 0)
    return local + body + directory + end


def crowded_zip() -> bytes:
    """More directory entries than members are allowed, of which the end record admits none."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, *[0] * 14)
    directory = entry * 20_000
    return zip_of()[:40] + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0, 0, len(directory), 40, 0)


def huge_directory_zip() -> bytes:
    """Few members with comments of 60 kB: zipfile would read the directory at once, however large."""
    infos = [zip_info(f"a/{number}.txt") for number in range(40)]
    for info in infos:
        info.comment = bytes(60_000)
    return zip_of(*[(info, b"") for info in infos])


def unended_tar() -> bytes:
    """Cut between two members, where only the missing end mark tells."""
    data = tar_of().rstrip(b"\0")
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def big_claim_tar() -> bytes:
    return tar_of()[: -tarfile.RECORDSIZE] + tar_info("a/big.png", 10**12).tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def big_header_tar(kind: bytes) -> bytes:
    """An extended header, read into memory as a whole, of a size that only a bomb has."""
    return tar_info("x", 10**9, kind).tobuf(tarfile.GNU_FORMAT) + bytes(MIB)


def negative_tar() -> bytes:
    header = bytearray(tar_info("a/x.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (2**96 - 512).to_bytes(12, "big")  # base 256, minus 512
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    return bytes(header) + bytes(1024)


def nested_headers_tar() -> bytes:
    """Thousands of extended headers before one file: tarfile descends into each."""
    record = b"11 path=xy\n"
    header = tar_info("x", len(record), tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    return header * 5000 + tar_of()


def sparse_tar() -> bytes:
    """A pax sparse file: a few bytes that claim to be a terabyte."""
    info = tar_info("a/sparse.png", 0)
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0",
                        "GNU.sparse.size": str(10**12), "GNU.sparse.name": "a/sparse.png"}  # fmt: skip
    return tar_of((info, b""), format_=tarfile.PAX_FORMAT)


def wide_window_zst(log: int) -> bytes:
    """A frame that asks its reader for a window of 2^log bytes (RFC 8878, 3.1.1.1.2), with a tar in one raw block."""
    content = tar_of()
    block = (1 | len(content) << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\0" + bytes([log - 10 << 3]) + block + content


def wide_window_xz() -> bytes:
    """A stream that asks its reader for a dictionary of 1 GiB (xz file format 5.3.1); nothing of that size is in it."""
    data = lzma.compress(tar_of(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**16}])
    header = data[12:20].replace(b"\x21\x01\x08", b"\x21\x01\x24")
    assert header != data[12:20]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "little") + data[24:]


def unicode_path_zip(path: str) -> bytes:
    """A harmless name, and beside it the Unicode path that replaces it."""
    info, data = zip_info("a/harmless.png"), struct.pack("<BI", 1, zlib.crc32(b"a/harmless.png")) + path.encode()
    info.extra = struct.pack("<HH", 0x7075, len(data)) + data
    return zip_of((info, picture(200)))


def pax_path_tar() -> bytes:
    info = tar_info("a/harmless.png")
    info.pax_headers = {"path": "../../outside.png"}
    return tar_of((info, b""), format_=tarfile.PAX_FORMAT)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip: absolute path": (lambda: named_zip("/etc/cron.d/x.png"), "its path is absolute"),
    "tar: absolute path": (lambda: named_tar("/etc/cron.d/x.png"), "its path is absolute"),
    "zip: parent folder": (lambda: named_zip("a/../../x.png"), "leads out of the archive"),
    "tar: parent folder": (lambda: named_tar("../x.png"), "leads out of the archive"),
    "tar: parent folder in a pax header": (pax_path_tar, "leads out of the archive"),
    "zip: parent folder behind litter": (lambda: named_zip("__MACOSX/../../x.png"), "leads out of the archive"),
    "zip: a folder called ..": (lambda: named_zip("a/../../"), "leads out of the archive"),
    "zip: parent folder by backslashes": (lambda: named_zip("..\\..\\x.png"), "leads out of the archive"),
    "zip: absolute path by backslashes": (lambda: named_zip("\\\\server\\x.png"), "its path is absolute"),
    "zip: drive letter by backslashes": (lambda: named_zip("C:\\windows\\x.png"), "its path is absolute"),
    "zip: parent folder in a Unicode path": (lambda: unicode_path_zip("../x.png"), "leads out of the archive"),
    "tar: backslashes": (lambda: named_tar("a\\x.png"), "backslash"),
    "zip: drive letter": (lambda: named_zip("C:/windows/x.png"), "its path is absolute"),
    "tar: drive letter": (lambda: named_tar("c:x.png"), "its path is absolute"),
    "zip: NUL in a name": (nul_zip, "NUL"),
    "zip: symbolic link": (lambda: zip_of((zip_info("a/l.png", 0o120777), b"/etc/passwd")), "a link"),
    "zip: device": (lambda: zip_of((zip_info("a/d.png", 0o060666), b"")), "a device"),
    "zip: fifo": (lambda: zip_of((zip_info("a/d.png", 0o010666), b"")), "a device"),
    "tar: symbolic link": (lambda: tar_of((tar_info("a/l.png", 0, tarfile.SYMTYPE, "/etc/passwd"), b"")), "a link"),
    "tar: hard link": (lambda: tar_of((tar_info("a/l.png", 0, tarfile.LNKTYPE, "a/1.png"), b"")), "a link"),
    "tar: character device": (lambda: tar_of((tar_info("a/d.png", 0, tarfile.CHRTYPE), b"")), "a device"),
    "tar: block device": (lambda: tar_of((tar_info("a/d.png", 0, tarfile.BLKTYPE), b"")), "a device"),
    "tar: fifo": (lambda: tar_of((tar_info("a/d.png", 0, tarfile.FIFOTYPE), b"")), "a device"),
    "tar: unknown kind": (lambda: tar_of((tar_info("a/d.png", 0, b"Z"), b"")), "only files and folders"),
    "tar: old GNU sparse file": (lambda: tar_of((tar_info("a/d.png", 0, tarfile.GNUTYPE_SPARSE), b"")), "sparse"),
    "tar: pax sparse file": (sparse_tar, "a/sparse.png"),
    "zip: encrypted": (encrypted_zip, "encrypted"),
    "zip: bzip2, whose pieces cannot be bounded": (bzip2_zip, "method 12"),
    "zip: same name twice": (
        lambda: zip_of(("a/x1.png", picture(3)), ("a/x2.png", picture(4))).replace(b"a/x2.png", b"a/x1.png"),
        "two files of that name",
    ),
    "tar: same name twice": (lambda: tar_of((tar_info("a/1.png"), b"")), "two files of that name"),
    "tar.bz2: bomb": (lambda: bz2.compress(tar_with("a/b.bmp", bytes(16 * MIB))), "as a bomb does"),
    "tar.xz: bomb": (lambda: lzma.compress(tar_with("a/b.bmp", bytes(16 * MIB))), "as a bomb does"),
    "tar.xz: bomb in a second stream": (
        lambda: lzma.compress(tar_of()) + lzma.compress(bytes(16 * MIB)),
        "as a bomb does",
    ),
    "tar.xz: a dictionary of a gigabyte": (wide_window_xz, "damaged or truncated"),
    "tar.xz: truncated": (lambda: lzma.compress(tar_of())[:-9], "damaged or truncated"),
    "tar.xz: a second stream that is none": (lambda: lzma.compress(tar_of()) + b"junk" * 4, "damaged or truncated"),
    "zip: very deep": (lambda: named_zip("d/" * 40 + "x.png"), "41 folders deep"),
    "tar: very long path": (lambda: named_tar("/".join(["d" * 200] * 6) + "/x.png"), "1211 characters"),
    "zip: very long part": (lambda: named_zip("a/" + "x" * 300), "longer than 255"),
    "zip: bomb": (lambda: zip_of(("a/bomb.bmp", bytes(8 * MIB))), "as a bomb does"),
    "zip: bomb with a lying header": (lying_zip, "damaged or truncated"),
    "zip: bomb of overlapping members": (overlapping_zip, "overlaps"),
    "zip: more than is allowed, as declared": (
        lambda: zip_of(("a/big.bmp", bytes(33 * MIB)), method=zipfile.ZIP_STORED),
        "33,554,432 bytes allowed",
    ),
    "tar: more than is allowed, as declared": (big_claim_tar, "33,554,432 bytes allowed"),
    "tar.gz: bomb": (lambda: gzip.compress(tar_of((tar_info("a/b.bmp", 16 * MIB), bytes(16 * MIB)))), "as a bomb does"),
    "tar.gz: bomb in what is passed over": (
        lambda: gzip.compress(tar_of((tar_info("__MACOSX/b", 16 * MIB), bytes(16 * MIB)))),
        "as a bomb does",
    ),
    "tar.gz: bomb behind the end mark": (lambda: gzip.compress(tar_of() + bytes(16 * MIB)), "as a bomb does"),
    "tar.zst: bomb": (
        lambda: zstd.compress(tar_of((tar_info("a/b.bmp", 16 * MIB), bytes(16 * MIB)))),
        "as a bomb does",
    ),
    "tar.zst: bomb in what is passed over": (
        lambda: zstd.compress(tar_of((tar_info("__MACOSX/b", 16 * MIB), bytes(16 * MIB)))),
        "as a bomb does",
    ),
    "tar.zst: bomb behind the end mark": (lambda: zstd.compress(tar_of() + bytes(16 * MIB)), "as a bomb does"),
    "tar.zst: bomb in a second frame": (
        lambda: zstd.compress(tar_of()) + zstd.compress(bytes(16 * MIB)),
        "as a bomb does",
    ),
    "tar.zst: more than is allowed, as declared": (lambda: zstd.compress(big_claim_tar()), "33,554,432 bytes allowed"),
    "tar.zst: a window of 256 MiB": (lambda: wide_window_zst(28), "damaged or truncated"),
    "tar.zst: a window of a terabyte": (lambda: wide_window_zst(40), "damaged or truncated"),
    "tar.zst: parent folder": (lambda: zstd.compress(named_tar("../x.png")), "leads out of the archive"),
    "tar.zst: truncated": (lambda: zstd.compress(tar_of())[:-9], "damaged or truncated"),
    "tar.zst: a second frame that is none": (lambda: zstd.compress(tar_of()) + b"junk" * 4, "damaged or truncated"),
    "zip: too many members": (lambda: zip_of(*[(f"a/{n}.txt", b"") for n in range(1300)]), "1,200 members"),
    "tar: too many members": (lambda: tar_of(*[(tar_info(f"a/{n}.txt"), b"") for n in range(1300)]), "1,200 members"),
    "zip: more members than it admits": (crowded_zip, "1,200 members"),
    "zip: a directory of gigabytes": (huge_directory_zip, "the zip's directory claims"),
    "tar: a pax header of a gigabyte": (lambda: big_header_tar(tarfile.XHDTYPE), "at most 65,536"),
    "tar: a global pax header of a gigabyte": (lambda: big_header_tar(tarfile.XGLTYPE), "at most 65,536"),
    "tar: a long name of a gigabyte": (lambda: big_header_tar(tarfile.GNUTYPE_LONGNAME), "at most 65,536"),
    "tar: negative size": (negative_tar, "claims -512 bytes"),
    "tar: header in header in header": (nested_headers_tar, "RecursionError"),
    "zip: truncated": (lambda: zip_of()[:-30], "damaged or truncated"),
    "tar: truncated": (lambda: tar_of().rstrip(b"\0"), "truncated"),
    "tar: truncated between members": (unended_tar, "no end mark"),
    "tar.gz: truncated": (lambda: gzip.compress(tar_of())[:-9], "damaged or truncated"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, max_images=100, max_unpacked_bytes=32 * MIB, max_image_pixels=10**6)


def parquet_of(table: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return bytes(out.getvalue())


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_good_part_of_every_attack_is_accepted(store: DatasetStore, tmp_path: Path) -> None:
    """Otherwise a refusal below could be for another reason."""
    for number, data in enumerate(
        [zip_of(), tar_of(), gzip.compress(tar_of(format_=tarfile.PAX_FORMAT)), wide_window_zst(27)]
    ):
        archive = tmp_path / f"good-{number}"
        archive.write_bytes(data)
        assert store.ingest(archive).splits == {"train": {"a": 2, "b": 2}}
    assert len(store.list()) == 1


@pytest.mark.parametrize(("attack", "says"), ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused_and_leave_nothing(
    store: DatasetStore, root: Path, tmp_path: Path, attack: Callable[[], bytes], says: str
) -> None:
    archive = tmp_path / "attack"
    archive.write_bytes(attack())
    (tmp_path / "outside").mkdir()
    before = tree(tmp_path)
    with pytest.raises(BadRequest) as caught:
        store.ingest(archive)
    assert caught.value.code == "bad_archive"
    assert says in caught.value.detail
    assert str(tmp_path) not in caught.value.detail
    assert tree(tmp_path) == before
    assert store.list() == []


def test_archives_and_other_strays_inside_are_listed_and_never_opened(root: Path, tmp_path: Path) -> None:
    store = DatasetStore(root, max_images=100, max_unpacked_bytes=32 * MIB, max_image_pixels=10**6, max_file_bytes=MIB)
    arrays = io.BytesIO()
    np.savez(arrays, np.zeros(3))
    strays = {
        "a/inner.zip": zip_of(("c/x.bin", os.urandom(2 * MIB))),  # larger than a picture may be
        "a/model.pth": zip_of(),
        "a/features.npz": arrays.getvalue(),
        "a/i.7z": b"7z\xbc\xaf\x27\x1c" + bytes(99),
        "b/9.png": zip_of(),
        "b/i.tar": tar_of(),
        "b/i.tgz": gzip.compress(tar_of()),
        "b/i.zst": zstd.compress(tar_of()),
        "labels.csv.gz": gzip.compress(b"file,label"),
        "model.tar.xz": lzma.compress(tar_of()),
        "train.parquet": b"PAR2" * 9,
        "embeddings.parquet": parquet_of(pa.table({"x": [0.5]})),
    }
    in_tar = [(tar_info(name, len(data)), data) for name, data in strays.items()]
    for archive in (zip_of(*strays.items()), tar_of(*in_tar)):
        (tmp_path / "strays").write_bytes(archive)
        dataset = store.ingest(tmp_path / "strays")
        assert (dataset.images, {one.name for one in dataset.skipped}) == (4, {*strays})
    reasons = {one.name: one.reason for one in dataset.skipped}
    assert reasons["a/model.pth"] == reasons["b/9.png"] == "an archive itself, which is not opened; expected pictures"
    assert "no parquet file" in reasons["train.parquet"]
    assert "expected one column of images" in reasons["embeddings.parquet"]


def test_office_documents_are_zips_that_nobody_means_as_archives(store: DatasetStore, tmp_path: Path) -> None:
    archive = tmp_path / "documents.zip"
    archive.write_bytes(zip_of(("a/notes.xlsx", zip_of())))
    assert [one.name for one in store.ingest(archive).skipped] == ["a/notes.xlsx"]


def test_a_name_cannot_write_to_a_terminal(store: DatasetStore, tmp_path: Path) -> None:
    archive = tmp_path / "names.tar"
    names = ["a/\x1b[2Jboo.txt", "a/new\nline.txt", "a/\udcff.txt"]
    archive.write_bytes(tar_of(*[(tar_info(name), b"") for name in names]))
    assert all(one.name.isprintable() for one in store.ingest(archive).skipped)
    assert len(store.list()[0].skipped) == 3
