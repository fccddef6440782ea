"""Hostile bundles, each by name, each with its refusal. Every file is built here byte by byte.

What is attacked: sizes that make a reader allocate, headers that mean two things, arrays that overlap, hide or lie, and
content that has two encodings (and so two versions).
"""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from prompts_store import Backbone, Bundle, BundleError, Manifest, Preprocess

MANIFEST = Manifest(
    task="victim",
    method="linear",
    backbone=Backbone("vit", "0" * 64),
    labels=("a", "b"),
    prompt_lengths=(0,),
    preprocess=Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "squash"),
    metrics={},
    recipe={},
    dataset=None,
    parent=None,
    created_at=1.0,
    lensrack_version="0.1.0",
)
WEIGHT = np.arange(8, dtype=np.float32).reshape(2, 4)
GOOD = Bundle.build(MANIFEST, {"head.bias": np.zeros(2, np.float32), "head.weight": WEIGHT})


def header() -> dict:
    return json.loads(GOOD.data[8 : 8 + struct.unpack("<Q", GOOD.data[:8])[0]])


def body() -> bytes:
    return GOOD.data[8 + struct.unpack("<Q", GOOD.data[:8])[0] :]


def file(head: dict | str | bytes, data: bytes | None = None, *, align: bool = True) -> bytes:
    text = head if isinstance(head, bytes) else head.encode() if isinstance(head, str) else canonical(head).encode()
    text += b" " * (-len(text) % 8 if align else 0)
    return struct.pack("<Q", len(text)) + text + (body() if data is None else data)


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def edited(edit: Callable[[dict], object], data: bytes | None = None) -> bytes:
    head = header()
    edit(head)
    return file(head, data)


def entry(name: str, **fields: object) -> bytes:
    return edited(lambda head: head[name].update(fields))


def manifest(text: str) -> bytes:
    return edited(lambda head: head["__metadata__"].update(lensrack=text))


def with_float(value: float) -> bytes:
    return body()[:-4] + struct.pack("<f", value)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    # sizes
    "empty file": (lambda: b"", "at least 8 bytes, got 0"),
    "seven bytes": (lambda: b"\0" * 7, "at least 8 bytes, got 7"),
    "header of 2^64 - 1 bytes": (lambda: b"\xff" * 8 + b"{}", f"a header of 2 to .* got a length of {2**64 - 1}"),
    "header just above the cap": (lambda: struct.pack("<Q", 4 * 2**20 + 1) + b" " * 100, "a header of 2 to"),
    "header longer than the file": (lambda: struct.pack("<Q", 1000) + b"{}", "a header of 1000 bytes, got 2"),
    "header of length zero": (lambda: struct.pack("<Q", 0), "a header of 2 to"),
    "truncated by one byte": (lambda: GOOD.data[:-1], "its bytes from|bytes of tensors"),
    "truncated in the header": (lambda: GOOD.data[:100], "a header of"),
    "a zip file": (lambda: b"PK\x03\x04" + b"\0" * 100, "header"),
    "a pickle": (lambda: pickle.dumps({"head.weight": [1.0]}, protocol=4), "header"),
    "manifest above 1 MiB": (lambda: manifest(" " * (2**20 + 1)), "at most 1048576 bytes of JSON"),
    "five thousand tensors": (
        lambda: edited(lambda head: head.update({f"t{i}": head["head.bias"] for i in range(5000)})),
        "at most 4096 tensors",
    ),
    "shape that overflows 64 bits": (
        lambda: entry("head.weight", shape=[2**24, 2**24, 2**24]),
        "expected .* bytes for",
    ),
    "a dimension of 2^40 beside a zero": (lambda: entry("head.bias", shape=[0, 2**40]), "1 to 3 sizes"),
    # headers that mean two things
    "header is no JSON": (lambda: file("{nope"), "expected JSON"),
    "header is a list": (lambda: file("[]"), r"expected an object, got \[\]"),
    "header is not UTF-8": (lambda: file(b'{"\xff":1}'), "UTF-8"),
    "header begins with a byte order mark": (lambda: file("\ufeff" + canonical(header())), "expected JSON"),
    "the same tensor twice": (
        lambda: file(canonical(header())[:-1] + ',"head.bias":' + canonical(header()["head.bias"]) + "}"),
        "'head.bias' more than once",
    ),
    "two manifests": (
        lambda: file(canonical(header())[:-1] + ',"__metadata__":{"lensrack":"{}"}}'),
        "'__metadata__' more than once",
    ),
    "a key twice within the manifest": (lambda: manifest('{"task":"a","task":"victim"}'), "'task' more than once"),
    "header nested 100,000 deep": (lambda: file('{"a":' * 100_000), "nesting"),
    "manifest nested 100,000 deep": (lambda: manifest("[" * 100_000), "nesting"),
    "metrics nested 50 deep": (
        lambda: manifest(
            GOOD.manifest.to_json().replace('"metrics":{}', '"metrics":{"a":' + "[" * 50 + "]" * 50 + "}")
        ),
        "levels of nesting",
    ),
    "trailing words after the header": (lambda: file(canonical(header()) + " evil"), "expected JSON"),
    # metadata
    "no metadata": (lambda: edited(lambda head: head.pop("__metadata__")), "the one key 'lensrack', got None"),
    "metadata is text": (lambda: edited(lambda head: head.update(__metadata__="x")), "the one key"),
    "a second metadata key": (lambda: edited(lambda head: head["__metadata__"].update(x="y")), "the one key"),
    "manifest is an object": (lambda: edited(lambda head: head["__metadata__"].update(lensrack={})), "as text"),
    "manifest is empty": (lambda: manifest(""), "expected JSON"),
    "task climbs out of its folder": (
        lambda: manifest(GOOD.manifest.to_json().replace('"victim"', '"../../etc"')),
        "a task name",
    ),
    "a label that drives a terminal": (
        lambda: manifest(GOOD.manifest.to_json().replace('"a","b"', '"\\u001b]0;x","b"')),
        "control characters",
    ),
    "format of the future": (
        lambda: manifest(GOOD.manifest.to_json().replace('"format":1', '"format":2')),
        "format: expected",
    ),
    # tensors
    "a name that is a path": (lambda: edited(lambda h: h.update({"../x": h.pop("head.bias")})), "tensor names like"),
    "an unknown field": (lambda: entry("head.bias", strides=[4]), "the fields dtype, shape and data_offsets"),
    "entry is a list": (lambda: edited(lambda head: head.update({"head.bias": []})), "the fields dtype"),
    "dtype I64": (lambda: entry("head.bias", dtype="I64"), "dtype F32 or F16, got 'I64'"),
    "dtype F64": (lambda: entry("head.bias", dtype="F64"), "dtype F32 or F16"),
    "dtype is a list": (lambda: entry("head.bias", dtype=["F32"]), "dtype F32 or F16"),
    "no dimensions": (lambda: entry("head.bias", shape=[]), "1 to 3 sizes"),
    "four dimensions": (lambda: entry("head.bias", shape=[2, 1, 1, 1]), "1 to 3 sizes"),
    "negative dimensions": (lambda: entry("head.bias", shape=[-2, -1]), "1 to 3 sizes"),
    "a dimension that is true": (lambda: entry("head.bias", shape=[True, 2]), "1 to 3 sizes"),
    "a dimension that is a float": (lambda: entry("head.bias", shape=[2.0]), "1 to 3 sizes"),
    "shape says more than the bytes": (lambda: entry("head.bias", shape=[3]), "expected 12 bytes .* got 8"),
    "offsets backwards": (lambda: entry("head.bias", data_offsets=[8, 0]), "expected 8 bytes .* got -8"),
    "negative offsets": (lambda: entry("head.bias", data_offsets=[-8, 0]), "two offsets"),
    "three offsets": (lambda: entry("head.bias", data_offsets=[0, 4, 8]), "two offsets"),
    "offsets past the end": (lambda: entry("head.weight", data_offsets=[16, 48]), "its bytes from"),
    "offsets of 2^60": (lambda: entry("head.weight", data_offsets=[2**60, 2**60 + 32]), "its bytes from"),
    "two tensors share bytes": (lambda: entry("head.weight", data_offsets=[4, 36]), "its bytes from 8"),
    "a hole between tensors": (
        lambda: edited(lambda h: h["head.weight"].update(data_offsets=[16, 48]), body()[:8] + b"EVIL" * 2 + body()[8:]),
        "its bytes from 8",
    ),
    "bytes hidden before the tensors": (
        lambda: edited(
            lambda h: (h["head.bias"].update(data_offsets=[4, 12]), h["head.weight"].update(data_offsets=[12, 44])),
            b"EVIL" + body(),
        ),
        "its bytes from 0",
    ),
    "bytes hidden after the tensors": (
        lambda: file(header(), body() + b"EVIL"),
        "expected 40 bytes .*, got 44",
    ),
    "NaN in the weights": (lambda: file(header(), with_float(float("nan"))), "head.weight: expected finite"),
    "infinity in the weights": (lambda: file(header(), with_float(float("-inf"))), "head.weight: expected finite"),
    "a head for other labels": (
        lambda: edited(lambda head: head["head.weight"].update(shape=[4, 2])),
        r"head.weight: expected \[2, D\]",
    ),
    "a bias of two dimensions": (lambda: entry("head.bias", shape=[2, 1]), r"head.bias: expected \[2\]"),
    "prompts without prompt_lengths": (
        lambda: edited(lambda head: head.update(prompts=head.pop("head.weight"))),
        r"prompts: expected \[0, D\].*got \[2, 4\]",
    ),
    # two encodings of one content
    "spaces in the header": (lambda: file(json.dumps(header(), sort_keys=True)), "canonical"),
    "keys in another order": (
        lambda: file(json.dumps(dict(reversed(header().items())), separators=(",", ":"))),
        "canonical",
    ),
    "more padding": (lambda: file(canonical(header()) + " " * 64), "canonical"),
    "no padding": (lambda: file(canonical(header()) + "   ", align=False), "canonical"),
    "padding with line breaks": (lambda: file(canonical(header()) + "\n"), "canonical"),
    "a letter escaped": (lambda: file(canonical(header()).replace("head.bias", "he\\u0061d.bias")), "canonical"),
    "spaces in the manifest": (lambda: manifest(GOOD.manifest.to_json().replace(",", ", ")), "canonical"),
    "a float written as an integer": (
        lambda: manifest(GOOD.manifest.to_json().replace('"created_at":1.0', '"created_at":1')),
        "canonical",
    ),
    "tensors in another order": (
        lambda: edited(
            lambda h: (h["head.bias"].update(data_offsets=[32, 40]), h["head.weight"].update(data_offsets=[0, 32])),
            body()[8:] + body()[:8],
        ),
        "canonical",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(name: str) -> None:
    make, refusal = ATTACKS[name]
    data = make()
    assert data != GOOD.data
    with pytest.raises(BundleError, match=refusal) as caught:
        Bundle.parse(data)
    assert caught.value.code == "bad_bundle"
    assert len(caught.value.detail) < 600, "an error must not carry the attacker's file"


def test_the_unharmed_file_passes() -> None:
    """Else every attack above would be refused for the wrong reason."""
    assert file(header()) == GOOD.data
    assert Bundle.parse(GOOD.data) == GOOD


LIES = [None, True, -1, 1.5, 10**30, "", "\0", "../x", "a" * 2000, [], [None], [[1]], {}, {"a": 1}, {"": []}]


@pytest.mark.parametrize("field", sorted(json.loads(GOOD.manifest.to_json())))
def test_every_field_of_the_manifest_lied_about(field: str) -> None:
    """Gone, or of another kind: refused. A few lies are words that the field may hold; then it is another version."""
    honest = json.loads(GOOD.manifest.to_json())
    lies = [{**honest, field: lie} for lie in LIES if lie != honest[field]]
    refused = 0
    for told in [{name: value for name, value in honest.items() if name != field}, *lies]:
        try:
            assert Bundle.parse(manifest(canonical(told))).version != GOOD.version
        except BundleError:
            refused += 1
    assert refused >= 10


@pytest.mark.parametrize("field", ["size", "mean", "std", "interpolation", "crop_pct", "crop_mode"])
def test_every_field_of_the_preprocessing_lied_about(field: str) -> None:
    honest = json.loads(GOOD.manifest.to_json())
    for lie in [*LIES, 0, [0, 0, 0], [1e400, 0, 0], float("1e300"), 2**31]:
        told = {**honest, "preprocess": {**honest["preprocess"], field: lie}}
        try:
            assert Bundle.parse(manifest(canonical(told))).version != GOOD.version
        except BundleError:
            continue


def test_a_file_above_the_limit_is_refused_unread() -> None:
    with pytest.raises(BundleError, match=f"at most {len(GOOD.data) - 1} bytes, got {len(GOOD.data)}"):
        Bundle.parse(GOOD.data, max_bytes=len(GOOD.data) - 1)
    assert Bundle.parse(GOOD.data, max_bytes=len(GOOD.data)) == GOOD


def test_every_flipped_bit_is_refused_or_another_version() -> None:
    """One bit anywhere: never an exception of another kind, never the same version for other bytes."""
    for position in range(len(GOOD.data)):
        data = bytearray(GOOD.data)
        data[position] ^= 1 << (position % 8)
        try:
            assert Bundle.parse(bytes(data)).version != GOOD.version
        except BundleError:
            continue


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD.data)):
        with pytest.raises(BundleError):
            Bundle.parse(GOOD.data[:length])


def test_a_small_file_cannot_make_the_reader_allocate_much() -> None:
    files = [make() for make, _ in ATTACKS.values() if len(make()) < 100_000]
    tracemalloc.start()
    try:
        for data in files:
            with pytest.raises(BundleError):
                Bundle.parse(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20, f"{peak} bytes"
