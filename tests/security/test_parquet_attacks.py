"""Malicious parquet files, crafted byte by byte: each is refused, the server survives, and nothing is left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from backports import zstd

from server.datasets.dataset_store import DatasetStore
from server.datasets.formats.parquet_members import _environment
from server.errors import BadRequest
from tests.datasets.test_dataset_store import EMPTY, LIMITS, REPOSITORY, noise, picture, tree, write_zip
from tests.datasets.test_parquet import TABLE, images, parquet

MIB = 2**20

# --- a parquet writer that says whatever it is told (Thrift compact protocol) -----------------------------------------


class Long(int):
    """An i64; plain numbers are i32."""


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class Struct(bytes):
    """A structure that is encoded already."""


def kind_of(value: object) -> int:
    return {int: 5, Long: 6, bytes: 8, list: 9, dict: 12, Struct: 12}[type(value)]


def thrift(value: Any) -> bytes:
    if isinstance(value, int):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if isinstance(value, Struct):
        return value
    if isinstance(value, bytes):
        return varint(len(value)) + value
    if isinstance(value, list):
        head = bytes([15 << 4 | (kind_of(value[0]) if value else 12)]) + varint(len(value))
        return head + b"".join(map(thrift, value))
    fields, last = b"", 0
    for field, one in value.items():
        fields += bytes([field - last << 4 | kind_of(one)]) + thrift(one)
        last = field
    return fields + b"\0"


DATA_PAGE, DICTIONARY_PAGE = 0, 2
NONE, ZSTD = 0, 6
TEXT = 6
PLAIN, RLE_DICTIONARY = 0, 8


def texts(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def page(content: bytes, values: int, *, unpacked: int | None = None, kind: int = DATA_PAGE, codec: int = NONE,
         encoding: int = PLAIN, more: Mapping[int, Any] | None = None) -> bytes:  # fmt: skip
    packed = zstd.compress(content) if codec == ZSTD else content
    about = {5: {1: values, 2: encoding, 3: 3, 4: 3}} if kind == DATA_PAGE else {7: {1: values, 2: encoding}}
    size = len(content) if unpacked is None else unpacked
    return thrift({1: kind, 2: size, 3: len(packed), **about, **(more or {})}) + packed


def column(name: bytes, type_: int, pages: list[bytes], start: int, *, values: int, codec: int, **more: Any) -> Any:
    meta = {1: type_, 2: [0, 3], 3: [name], 4: codec, 5: Long(values), 6: Long(1), 7: Long(sum(map(len, pages)))}
    meta |= {9: Long(start + (len(pages[0]) if len(pages) > 1 else 0))}
    if len(pages) > 1:
        meta[11] = Long(start)
    return {2: Long(start), 3: dict(sorted((meta | more.get("meta", {})).items()))}


def crafted(pictures: list[bytes], rows: int = 2, labels: list[bytes] | None = None, codec: int = NONE,
            schema: list[Any] | None = None, **more: Any) -> bytes:  # fmt: skip
    """A file of two columns: the pages of `pictures` (a dictionary first, where there are two) and of labels."""
    labels = labels or [page(texts(*[b"a", b"b"] * (rows // 2)), rows)]
    body = b"PAR1" + b"".join(pictures)
    columns = [
        column(b"image", TEXT, pictures, 4, values=rows, codec=codec, **more),
        column(b"label", TEXT, labels, len(body), values=rows, codec=NONE),
    ]
    columns[0] |= more.get("chunk", {})
    body += b"".join(labels)
    root = [{4: b"schema", 5: 2}, {1: TEXT, 3: 0, 4: b"image"}, {1: TEXT, 3: 0, 4: b"label", 6: 0}]
    group = {1: [dict(sorted(each.items())) for each in columns], 2: Long(1), 3: Long(more.get("group_rows", rows))}
    footer = thrift({1: 1, 2: schema or root, 3: Long(more.get("footer_rows", rows)), 4: [group]})
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


GOOD_PAGE = page(texts(*(picture(number) for number in range(4))), 4)
NOISE = next(iter(noise(1).values()))
DEEP = [{4: b"schema", 5: 1}, *[{3: 0, 4: b"x", 5: 1}] * 50_000, {1: TEXT, 3: 0, 4: b"image"}]


def dictionary_bomb() -> bytes:
    """One megabyte, referred to by every one of a thousand rows."""
    big = os.urandom(MIB)
    indices = bytes([1]) + varint(1000 << 1) + b"\0"  # bit width 1; a run of a thousand zeros
    pages = [page(texts(big), 1, kind=DICTIONARY_PAGE), page(indices, 1000, encoding=RLE_DICTIONARY)]
    return crafted(pages, rows=1000)


def honest_bomb() -> bytes:
    table = pa.table({"image": pa.array([bytes(20 * MIB)] * 4), "label": ["a", "b"] * 2})
    return parquet(table, compression="zstd", use_dictionary=False)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bomb in a page": (honest_bomb, "column 'image' unpacks to more than 200 times its size, as a bomb does"),
    "a bomb in a dictionary": (dictionary_bomb, "the upload unpacks to more than"),
    "a page that claims two gigabytes": (
        lambda: crafted([page(texts(b"x") * 2, 2, unpacked=2**31 - 1, codec=ZSTD)], codec=ZSTD),
        "a page of 2,147,483,647 bytes",
    ),
    "a page that claims a negative size": (
        lambda: crafted([page(texts(b"x") * 2, 2, unpacked=-5, codec=ZSTD)], codec=ZSTD), "header lacks a number",
    ),
    "a page that claims less than it holds": (
        lambda: crafted([page(texts(*[bytes(9999)] * 2), 2, unpacked=10, codec=ZSTD)], codec=ZSTD), "damaged",
    ),
    "a dictionary of two thousand million values": (
        lambda: crafted([page(b"", 2**31 - 1, kind=DICTIONARY_PAGE), page(bytes(9), 2, encoding=RLE_DICTIONARY)]),
        "a dictionary claims more values than it has bytes for",
    ),
    "more values in a page than rows": (lambda: crafted([page(texts(b"x") * 9, 9)]), "hold 9 values"),
    "a page's header of nested structures": (
        lambda: crafted([page(b"", 2, more={9: Struct(b"\x1c" * 5000 + bytes(5001))})]), "is nested too deeply",
    ),
    "a page's header without an end": (lambda: crafted([b"\x15" * 40_000]), "damaged"),
    "a field twice": (lambda: crafted([b"\x15\x00\x05\x02\x04" + b"\0"]), "a field twice"),
    "a number without an end": (lambda: crafted([b"\x15" + b"\xff" * 40]), "a number without an end"),
    "a text longer than its page": (lambda: crafted([page((2**31 - 1).to_bytes(4, "little") * 2, 2)]), "damaged"),
    "a text of negative length": (lambda: crafted([page((2**32 - 1).to_bytes(4, "little") * 2, 2)]), "damaged"),
    "a million million rows": (lambda: crafted([GOOD_PAGE], 4, footer_rows=10**12), "1,000,000,000,000 rows"),
    "a group of more rows than its columns": (lambda: crafted([GOOD_PAGE], 4, group_rows=10**9), "impossible numbers"),
    "negative rows": (lambda: crafted([GOOD_PAGE], 4, footer_rows=-4, group_rows=-4), "impossible numbers"),
    "pages before the file": (lambda: crafted([GOOD_PAGE], 4, meta={9: Long(-100)}), "impossible numbers"),
    "pages behind the file": (lambda: crafted([GOOD_PAGE], 4, meta={9: Long(10**9)}), "damaged"),
    "a column of negative size": (lambda: crafted([GOOD_PAGE], 4, meta={7: Long(-1)}), "impossible numbers"),
    "a column in another file": (lambda: crafted([GOOD_PAGE], 4, chunk={1: b"/etc/passwd"}), "impossible numbers"),
    "statistics that end the library's process": (
        lambda: crafted([GOOD_PAGE], 4, meta={16: {2: [Long(1)] * 5, 3: [Long(1)] * 5}}), "its reader crashed",
    ),
    "a schema of fifty thousand floors": (lambda: crafted([GOOD_PAGE], 4, schema=DEEP), "damaged"),
    "a footer of gigabytes": (lambda: parquet(TABLE)[:-8] + b"\xff\xff\xff\xffPAR1", "a footer of 4,294,967,295"),
    "a footer that is cut": (lambda: b"PAR1" + crafted([GOOD_PAGE], 4)[-80:], "claims a footer"),
    "an encrypted file": (lambda: b"PAR1" + parquet(TABLE)[4:-4] + b"PARE", "does not end like a parquet file"),
    "a metadata of nonsense": (lambda: b"PAR1" + os.urandom(500) + (400).to_bytes(4, "little") + b"PAR1", "damaged"),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "datasets"


@pytest.fixture
def store(root: Path) -> DatasetStore:
    return DatasetStore(root, **{**LIMITS, "max_unpacked_bytes": 2**30})


def attack(store: DatasetStore, root: Path, tmp_path: Path, data: bytes) -> str:
    (tmp_path / "attack").write_bytes(data)
    with pytest.raises(BadRequest) as caught:
        store.ingest(tmp_path / "attack")
    assert caught.value.code in ("bad_archive", "bad_dataset")
    assert str(tmp_path) not in caught.value.detail
    assert tree(root) == EMPTY
    assert not any((root / "staging").iterdir())
    return caught.value.detail


def test_the_crafted_file_is_good_where_it_does_not_lie(store: DatasetStore, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"codec": ZSTD})):
        pages = page(texts(*(picture(index) for index in range(4))), 4, **options)
        (tmp_path / "good").write_bytes(crafted([pages], 4, **options))
        dataset = store.ingest(tmp_path / "good", name=str(number))
        assert dataset.splits == {"train": {"a": 2, "b": 2}}
    indices = bytes([1]) + varint(2 << 1) + b"\0" + varint(2 << 1) + b"\1"  # 0, 0, 1, 1
    words = [page(texts(picture(1), picture(2)), 2, kind=DICTIONARY_PAGE), page(indices, 4, encoding=RLE_DICTIONARY)]
    (tmp_path / "dictionary").write_bytes(crafted(words, 4))
    assert store.ingest(tmp_path / "dictionary").report.duplicates.contradictory == 2


@pytest.mark.parametrize(("make", "says"), ATTACKS.values(), ids=ATTACKS)
def test_attacks_are_refused_and_leave_nothing(
    root: Path, tmp_path: Path, make: Callable[[], bytes], says: str
) -> None:
    store = DatasetStore(root, **{**LIMITS, "max_unpacked_bytes": 2**30})
    assert says in attack(store, root, tmp_path, make())


def test_the_readers_memory_is_bounded_by_the_kernel() -> None:
    script = "from server.datasets.formats.parquet_reader import _limit; _limit(0); bytearray(2**20); bytearray(2**32)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


def test_flipped_bytes_give_a_dataset_or_a_refusal_and_the_server_lives(
    store: DatasetStore, root: Path, tmp_path: Path
) -> None:
    whole = parquet(TABLE)
    generator = random.Random(4)
    codes = []
    for _ in range(25):
        broken = bytearray(whole)
        for _ in range(generator.choice([1, 3, 20])):
            broken[len(broken) - 9 - generator.randrange(900)] = generator.randrange(256)
        (tmp_path / "a").write_bytes(broken)
        try:
            store.delete(store.ingest(tmp_path / "a").id)
        except BadRequest as error:
            codes.append(error.code)
        assert tree(root) == EMPTY
    assert set(codes) <= {"bad_archive", "bad_dataset"}
    assert len(codes) > 5


def test_attacks_inside_an_archive_are_refused_as_well(store: DatasetStore, root: Path, tmp_path: Path) -> None:
    data = write_zip(
        tmp_path / "b.zip", {"data/train.parquet": parquet(TABLE), "x.parquet": honest_bomb()}
    ).read_bytes()
    assert "as a bomb does" in attack(store, root, tmp_path, data)


def test_secrets_are_not_handed_to_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENSRACK_REDIS", "redis://:mellon@host")
    assert not any("mellon" in value for value in _environment().values())


def test_pictures_in_pages_of_many_megabytes_are_read(store: DatasetStore, tmp_path: Path) -> None:
    """What an honest writer does with large photographs fits into the reader's memory."""
    data = [NOISE + os.urandom(12 * MIB) for _ in range(8)]  # a PNG may be followed by anything
    table = pa.table({"image": images(data), "label": ["a", "b"] * 4})
    (tmp_path / "large").write_bytes(parquet(table, compression="none"))
    assert store.ingest(tmp_path / "large").images == 8
