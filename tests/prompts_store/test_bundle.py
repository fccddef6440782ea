"""The bundle: one content, one file, one version; and a manifest that says what is wrong with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from lensrack import wire
from prompts_store import Backbone, Bundle, BundleError, Manifest, Preprocess, names

ROOT = Path(__file__).resolve().parents[2]
PINNED = "3c5b79afeaa745435f07e3a745985cd07b7c9b05b70d86fa9c37945b873a4bc5"
PREPROCESS = Preprocess(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9, "center")
MANIFEST = Manifest(
    task="flowers",
    method="vpt_deep",
    backbone=Backbone("vit_tiny_patch16_224", "ab" * 32),
    labels=("rosé", "tulip", "\N{CHERRY BLOSSOM}"),
    prompt_lengths=(2, 0, 1),
    preprocess=PREPROCESS,
    metrics={"val_accuracy": 0.5, "confusion": [[1, 2], [3, 4]]},
    recipe={"lr": 0.1, "epochs": 3, "seed": None},
    dataset="cd" * 32,
    parent=None,
    created_at=1_700_000_000.25,
    lensrack_version="0.1.0",
)


def test_a_pooling_is_written_only_where_it_is_not_the_backbones_own() -> None:
    assert "pool" not in json.loads(MANIFEST.to_json())
    chosen = replace(MANIFEST, pool="image_and_prompts")
    assert Manifest.from_json(chosen.to_json()) == chosen
    for wrong in (None, "attention", "max", 1):
        with pytest.raises(BundleError, match="manifest: pool: expected one of cls, image, image_and_prompts"):
            Manifest.from_json(changed("pool", wrong))


def tensors() -> dict[str, np.ndarray]:
    return {
        "head.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 8,
        "head.bias": np.array([0.5, -0.0, 1e-40], np.float32),
        "prompts": np.arange(12, dtype=np.float16).reshape(3, 4) / 4,
    }


def changed(path: str, value: object) -> str:
    """The manifest's JSON with one field, dotted, set to `value`."""
    document = json.loads(MANIFEST.to_json())
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    return json.dumps(document)


# --- one content, one version --------------------------------------------------------------------------------------


def test_version_is_the_pinned_digest() -> None:
    """If this fails, every stored bundle has lost its name: the encoding must not change, it must get a new format."""
    assert Bundle.build(MANIFEST, tensors()).version == PINNED


def test_version_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import runpy; t = runpy.run_path('tests/prompts_store/test_bundle.py');"
        "print(t['Bundle'].build(t['MANIFEST'], t['tensors']()).version)"
    )
    for seed in ("1", "4242"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == PINNED


def test_order_layout_and_key_order_do_not_matter() -> None:
    backwards = dict(reversed(tensors().items()))
    backwards["head.weight"] = np.asfortranarray(backwards["head.weight"])
    backwards["prompts"] = np.repeat(backwards["prompts"], 2, axis=0)[::2]
    shuffled = replace(MANIFEST, recipe=dict(reversed(MANIFEST.recipe.items())))
    assert Bundle.build(shuffled, backwards).data == Bundle.build(MANIFEST, tensors()).data


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "prompts"])
def test_one_number_changes_the_version(name: str) -> None:
    other = tensors()
    other[name].flat[0] += 1
    assert Bundle.build(MANIFEST, other).version != PINNED


def test_parse_gives_back_what_was_built() -> None:
    built = Bundle.build(MANIFEST, tensors())
    parsed = Bundle.parse(built.data)
    assert parsed == built
    assert hash(parsed) == hash(built)
    assert parsed.manifest == MANIFEST
    assert {n: (a.dtype, a.tobytes()) for n, a in parsed.tensors.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in tensors().items()
    }
    with pytest.raises(ValueError, match="read-only"):
        parsed.tensors["prompts"][0, 0] = 1


def test_the_safetensors_library_reads_it() -> None:
    loaded = load_safetensors(Bundle.build(MANIFEST, tensors()).data)
    assert loaded.keys() == tensors().keys()
    for name, array in tensors().items():
        np.testing.assert_array_equal(loaded[name], array)


def test_no_tensors_and_empty_tensors_are_bundles() -> None:
    bare = replace(MANIFEST, prompt_lengths=(0,))
    for arrays in ({}, {"prompts": np.zeros((0, 4), np.float32), "a": np.zeros((0,), np.float32)}):
        assert Bundle.parse(Bundle.build(bare, arrays).data).tensors.keys() == arrays.keys()


# --- what build refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("w", np.zeros(2), "float32 or float16 array, got float64"),
        ("w", np.zeros(2, np.int8), "got int8"),
        ("w", np.zeros(2, ">f4"), "got >f4"),
        ("w", np.array([object()]), "got object"),
        ("w", [1.0], "got list"),
        ("w", np.array([np.nan], np.float32), "finite"),
        ("w", np.array([np.inf], np.float16), "finite"),
        ("w", np.zeros((), np.float32), "1 to 3 sizes"),
        ("w", np.zeros((1, 1, 1, 1), np.float32), "1 to 3 sizes"),
        ("W", np.zeros(1, np.float32), "tensor names"),
        ("../w", np.zeros(1, np.float32), "tensor names"),
        ("w\n", np.zeros(1, np.float32), "tensor names"),
        ("__metadata__", np.zeros(1, np.float32), "tensor names"),
        (1, np.zeros(1, np.float32), "tensor names"),
        ("head.weight", np.zeros((2, 4), np.float32), r"expected \[3, D\].*got \[2, 4\]"),
        ("head.weight", np.zeros((3,), np.float32), r"expected \[3, D\].*got \[3\]"),
        ("head.bias", np.zeros((4,), np.float32), r"expected \[3\].*got \[4\]"),
        ("head.bias", np.zeros((3, 1), np.float32), r"expected \[3\].*got \[3, 1\]"),
        ("prompts", np.zeros((4, 8), np.float32), r"expected \[3, D\].*got \[4, 8\]"),
    ],
)
def test_build_refuses(name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.build(MANIFEST, {name: array})
    assert caught.value.code == "bad_bundle"


def test_build_refuses_too_many_tensors() -> None:
    with pytest.raises(BundleError, match="at most 4096 tensors, got 4097"):
        Bundle.build(MANIFEST, {f"t{i}": np.zeros(1, np.float16) for i in range(4097)})


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_manifest_json_is_canonical() -> None:
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    assert Manifest.from_json(text).to_json() == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


BAD_FIELDS = [
    ("task", "Flowers", "a task name .*got 'Flowers'"),
    ("task", "flowers\n", "a task name"),
    ("task", "../etc", "a task name"),
    ("task", None, "got None"),
    ("method", "", "a method name"),
    ("backbone", "vit", "backbone: expected an object, got 'vit'"),
    ("backbone.fingerprint", "ab", "backbone: fingerprint: expected a sha256"),
    ("backbone.arch", "", "1 to 200 characters"),
    ("backbone.extra", 1, "only the fields arch, fingerprint, got 'extra'"),
    ("labels", [], "expected 1 to 10000 labels, got 0"),
    ("labels", [str(i) for i in range(10001)], "got 10001"),
    ("labels", "abc", "a list of 1 to 10000 labels, got 'abc'"),
    ("labels", ["a", "a"], "unique labels, got 'a twice'"),
    ("labels", ["a", ""], r"labels\[1\]: expected text of 1 to 200"),
    ("labels", ["a" * 201], "1 to 200"),
    ("labels", ["a\x1b[31m"], "control characters"),
    ("labels", ["a\u2028b"], "control characters"),
    ("labels", ["\ud800"], "lone surrogate"),
    ("labels", [1], "text of 1 to 200 characters, got 1"),
    ("prompt_lengths", [], "expected 1 to 256 layers, got 0"),
    ("prompt_lengths", [0] * 257, "got 257"),
    ("prompt_lengths", [-1], "from 0 to 1000, got -1"),
    ("prompt_lengths", [1001], "from 0 to 1000, got 1001"),
    ("prompt_lengths", [True], "got True"),
    ("prompt_lengths", [1.0], "got 1.0"),
    ("preprocess.size", 0, "from 1 to 4096, got 0"),
    ("preprocess.mean", [0.5, 0.5], "expected 3 numbers, got 2"),
    ("preprocess.std", [0.5, 0.0, 0.5], r"std\[1\]: expected a number above 0"),
    ("preprocess.interpolation", "area", "one of bilinear, bicubic, lanczos, nearest, got 'area'"),
    ("preprocess.interpolation", [], "one of"),
    ("preprocess.crop_pct", 0, "above 0"),
    ("preprocess.crop_pct", 1.5, "at most 1, got 1.5"),
    ("preprocess.crop_mode", "middle", "center, squash, border"),
    ("metrics", [], "metrics: expected an object"),
    ("recipe", {"seed": 2**63}, "integers below 2"),
    ("recipe", {"a": [[[[[[[[[[[[1]]]]]]]]]]]]}, "levels of nesting"),
    ("dataset", "", "1 to 200"),
    ("parent", "abc", "a version"),
    ("created_at", "now", "a number"),
    ("created_at", 1e12, "at most 1e"),
    ("created_at", 10**17, "at most 1e"),
    ("lensrack_version", 1, "text"),
    ("format", 2, "format: expected an integer from 1 to 1, got 2"),
    ("format", True, "got True"),
    ("unknown", 1, "got 'unknown'"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_FIELDS)
def test_manifest_refuses(path: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_json(changed(path, value))
    assert "expected" in caught.value.detail
    assert "got" in caught.value.detail
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize("name", json.loads(MANIFEST.to_json()))
def test_manifest_needs_every_field(name: str) -> None:
    document = json.loads(MANIFEST.to_json())
    del document[name]
    with pytest.raises(BundleError, match=f"expected the field '{name}', got none"):
        Manifest.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("[]", r"expected an object, got \[\]"),
        ('{"task":"a","task":"b"}', "'task' more than once"),
        ('{"metrics":NaN}', "NaN, which is not a JSON number"),
        ('{"metrics":-Infinity}', "not a JSON number"),
        ('{"metrics":1e999}', "finite"),
        ('{"metrics":' + "9" * 5000 + "}", "expected JSON"),
        ("[" * 100_000, "nesting"),
        (b"\xff\xfe", "UTF-8"),
        (" " * (2**20 + 1), f"at most {2**20} bytes"),
    ],
)
def test_manifest_refuses_text(text: str | bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(text)


@pytest.mark.parametrize("metrics", [{"a": float("nan")}, {"a": np.float32(1)}, {"a": {1, 2}}, {("a",): 1}])
def test_build_refuses_metrics_that_are_no_json(metrics: dict) -> None:
    with pytest.raises(BundleError, match="plain finite JSON"):
        Bundle.build(replace(MANIFEST, metrics=metrics), tensors())


def test_names_are_those_of_the_wire() -> None:
    """The store may not import pydantic, so the patterns stand twice; here they are held together."""
    for ours, theirs in (
        (names.TASK, wire.TASK_PATTERN),
        (names.ALIAS, wire.ALIAS_PATTERN),
        (names.VERSION, wire.VERSION_PATTERN),
    ):
        assert re.compile(theirs).pattern == f"^{ours.pattern}$"
