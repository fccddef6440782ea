"""Archives as they should be, and damaged ones. The deliberate attacks are in tests/security."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import pytest
from backports import zstd

from server.datasets.formats.archive import Limits, members, sniff
from server.errors import BadRequest

FILES = {
    "wrap/train/katze/1.jpg": b"\xff\xd8 one",
    "wrap/train/hund/ä 2.jpg": b"two" * 1000,
    "wrap/leer.txt": b"",
    "wrap/train/hund/3.jpg": bytes(range(256)) * 300,
}
Make = Callable[[dict[str, bytes]], bytes]


def as_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def as_tar(files: dict[str, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def as_tar_gz(files: dict[str, bytes]) -> bytes:
    return gzip.compress(as_tar(files))


def as_tar_zst(files: dict[str, bytes]) -> bytes:
    """With its length and a checksum, as the zstd tool writes it."""
    return zstd.compress(as_tar(files), options={zstd.CompressionParameter.checksum_flag: 1})


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0pzst"  # pzstd begins with such a frame

MAKERS: dict[str, Make] = {
    "zip": as_zip,
    "stored zip": lambda files: as_zip(files, zipfile.ZIP_STORED),
    "pax tar": as_tar,
    "gnu tar": lambda files: as_tar(files, tarfile.GNU_FORMAT),
    "tar.gz": as_tar_gz,
    "tar.gz in two pieces": lambda files: gzip.compress(as_tar(files)[:700]) + gzip.compress(as_tar(files)[700:]),
    "tar.bz2": lambda files: bz2.compress(as_tar(files)),
    "tar.xz": lambda files: lzma.compress(as_tar(files)),
    "tar.xz in two streams": lambda files: (
        lzma.compress(as_tar(files)[:700]) + bytes(8) + lzma.compress(as_tar(files)[700:])
    ),
    "tar.zst": as_tar_zst,
    "tar.zst in three frames": lambda files: (
        SKIPPABLE + zstd.compress(as_tar(files)[:700]) + zstd.compress(as_tar(files)[700:])
    ),
}
each_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def read(data: bytes, **limits: int | float) -> dict[str, bytes]:
    return {one.name: one.read(10**7) for one in members(io.BytesIO(data), Limits(**limits))}  # type: ignore[arg-type]


def refusal(data: bytes, **limits: int | float) -> str:
    with pytest.raises(BadRequest) as caught:
        read(data, **limits)
    assert caught.value.code == "bad_archive"
    return caught.value.detail


@each_kind
def test_every_kind_gives_the_same_members(make: Make) -> None:
    assert read(make(FILES)) == FILES


def test_kinds_are_told_by_content() -> None:
    assert sniff(as_zip(FILES)[:512]) == "zip"
    assert sniff(as_zip({})[:512]) == "zip"
    assert sniff(as_tar(FILES)[:512]) == "tar"
    assert sniff(as_tar_gz(FILES)[:512]) == "tar.gz"
    assert sniff(as_tar_zst(FILES)[:512]) == sniff(SKIPPABLE) == "tar.zst"
    assert sniff(bz2.compress(b"")) == sniff(bz2.compress(b"x")) == "tar.bz2"
    assert sniff(lzma.compress(b"")) == "tar.xz"
    old = bytearray(as_tar({"a": b"b"}, tarfile.USTAR_FORMAT)[:512])
    old[257:265] = bytes(8)  # an old v7 archive has no magic
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 8 * 32 + sum(old[156:512]))
    assert sniff(bytes(old)) == "tar"
    for other in (b"", b"\x89PNG\r\n\x1a\n", b"7z\xbc\xaf\x27\x1c", b"BZh9", bytes(512), b"hello" * 200):
        assert sniff(other[:512]) is None


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff\xe0 a picture", bytes(10_240)])
def test_other_files_are_refused_with_what_was_expected_and_what_came(data: bytes) -> None:
    detail = refusal(data)
    assert "expected a zip, tar, tar.gz, tar.zst, tar.bz2 or tar.xz archive" in detail
    assert (data[:4].hex(" ") or "nothing") in detail


def test_a_packed_file_without_a_tar_inside_is_refused() -> None:
    assert "damaged" in refusal(gzip.compress(b"just text " * 200))
    assert "damaged" in refusal(zstd.compress(b"just text " * 200))


@each_kind
def test_litter_and_folders_are_passed_over(make: Make) -> None:
    litter = dict.fromkeys(
        ["__MACOSX/wrap/._1.jpg", "wrap/.DS_Store", "wrap/Thumbs.db", "wrap/.git/config", "wrap/desktop.ini"], b"x"
    )
    assert read(make({**litter, **FILES})) == FILES


def test_explicit_folders_and_dots_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in (".", "./cat", "./cat/"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("./cat//1.jpg"))
    assert read(out.getvalue()) == {"cat/1.jpg": b""}
    assert read(as_zip({"cat/": b"", "cat/1.jpg": b"x"})) == {"cat/1.jpg": b"x"}


# --- names ------------------------------------------------------------------------------------------------------------

KEPT = ["Ka\u0308fer/1.jpg", "K\u00e4fer/1.jpg", "me\u200cn/1.jpg", "a  b /1.jpg", "A/1.JPG", "A/1.jpg", "a/1.jpg"]


@each_kind
def test_names_stay_as_they_are_and_twins_are_two(make: Make) -> None:
    assert [*read(make(dict.fromkeys(KEPT, b"")))] == KEPT


def unflagged_zip(name: bytes, *, extra: bytes = b"") -> bytes:
    """A zip whose name has these bytes and no bit 11."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("x" * len(name))
        info.extra = extra
        archive.writestr(info, b"")
    return out.getvalue().replace(b"x" * len(name), name)


def unicode_path(name: str, replaced: bytes) -> bytes:
    data = struct.pack("<BI", 1, zlib.crc32(replaced)) + name.encode()
    return b"\xff\xff\0\0" + struct.pack("<HH", 0x7075, len(data)) + data  # after another field


def tar_named(name: bytes, format_: int = tarfile.GNU_FORMAT) -> bytes:
    return as_tar({name.decode("utf-8", "surrogateescape"): b""}, format_)


def test_names_without_bit_11_are_utf_8_or_what_the_unicode_path_says() -> None:
    cyrillic, cp866 = "кошки/1.jpg", "кошки/1.jpg".encode("cp866")
    assert [*read(unflagged_zip(cyrillic.encode()))] == [cyrillic]
    assert [*read(unflagged_zip(cp866, extra=unicode_path(cyrillic, cp866)))] == [cyrillic]
    assert "code page" in refusal(unflagged_zip(cp866, extra=unicode_path(cyrillic, b"other")))
    assert [*read(tar_named(cyrillic.encode()))] == [cyrillic]


@pytest.mark.parametrize("make", [unflagged_zip, tar_named, lambda name: tar_named(name, tarfile.PAX_FORMAT)])
def test_a_folder_in_a_code_page_is_refused_and_a_file_is_escaped(make: Callable[[bytes], bytes]) -> None:
    detail = refusal(make("кошки/1.jpg".encode("cp866")))
    assert "is not UTF-8" in detail
    assert "cp866 reads 'кошки'" in detail
    assert "cp437 reads '¬«Φ¬¿'" in detail
    assert [*read(make(b"cat/caf\xe9.jpg"))] == ["cat/caf\\xe9.jpg"]


def test_backslashes_of_windows_are_folders() -> None:
    assert read(as_zip({"pets\\cat\\": b"", "pets\\cat\\1.jpg": b"x"})) == {"pets/cat/1.jpg": b"x"}


# --- parts and damage -------------------------------------------------------------------------------------------------


@each_kind
def test_members_need_not_be_read_and_can_be_read_in_part(make: Make) -> None:
    data = make(FILES)
    assert [one.name for one in members(io.BytesIO(data), Limits())] == [*FILES]
    parts = {one.name: one.read(3) for one in members(io.BytesIO(data), Limits())}
    assert parts == {name: content[:4] for name, content in FILES.items()}


@each_kind
def test_an_archive_cut_anywhere_is_refused(make: Make) -> None:
    data = make(FILES)
    generator = random.Random(1)
    ends = {len(data) - 1, len(data) // 2, 520} | {generator.randrange(513, len(data)) for _ in range(40)}
    if data[:2] not in (
        b"PK",
        b"\x1f\x8b",
        b"\x28\xb5",
        b"BZ",
        b"\xfd7",
        SKIPPABLE[:2],
    ):  # tar ends in zeros, and any two blocks of them are an end
        ends = {end for end in ends if end < len(data.rstrip(b"\0"))}
    for end in ends:
        assert "truncated" in refusal(data[:end])


@each_kind
def test_flipped_bytes_give_members_or_a_refusal_and_nothing_else(make: Make) -> None:
    data = make({name: content[:2000] for name, content in FILES.items()})
    generator = random.Random(2)
    codes = []
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(generator.choice([1, 1, 3, 30])):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        try:
            read(bytes(broken))
        except BadRequest as error:
            codes.append(error.code)
    assert set(codes) == {"bad_archive"}
    assert len(codes) > 40


def test_damaged_content_is_noticed_by_its_checksum() -> None:
    data = bytearray(as_zip({"a.jpg": b"0123456789" * 10}, zipfile.ZIP_STORED))
    data[data.index(b"0123456789") + 5] ^= 1
    assert "damaged" in refusal(bytes(data))
    packed = bytearray(as_tar_gz(FILES))
    packed[-6] ^= 1
    assert "damaged" in refusal(bytes(packed))
    packed = bytearray(as_tar_zst(FILES))
    packed[-2] ^= 1
    assert "damaged" in refusal(bytes(packed))


def test_limits_hold_at_their_edge() -> None:
    data = as_tar_gz(FILES)
    assert len(read(data, max_members=4)) == 4
    assert "3 members" in refusal(data, max_members=3)
    zipped = as_zip(FILES)
    total = sum(map(len, FILES.values()))
    assert read(zipped, max_unpacked_bytes=total) == FILES
    assert f"{total - 1:,} bytes" in refusal(zipped, max_unpacked_bytes=total - 1)
