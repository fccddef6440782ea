"""The Open Inference Protocol as its specification has it, over HTTP: shapes, datatypes, bytes and their lies."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.api.oip import body
from server.engine.images.decode import Geometry, of_picture, pixels
from server.errors import ServiceError
from server.serving.decoding import DecodedImage, model_input
from tests.api.api_server import Api, assert_refused, serving
from tests.serving.floor import SIZE, png, publish

LENGTH = "Inference-Header-Content-Length"
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), max_body_bytes=400_000, max_images=4) as api:
        publish(api.floor.store, "fish")
        publish(api.floor.store, "birds", labels=("crow", "sparrow", "ümläut", "owl"))
        yield api


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **parameters: Any) -> dict[str, Any]:
    told = {"name": name, "datatype": datatype, "shape": shape}
    return told | ({} if data is None else {"data": data}) | ({"parameters": parameters} if parameters else {})


def image(*greys: int) -> dict[str, Any]:
    return tensor("image", "BYTES", [len(greys)], [base64.b64encode(png(grey)).decode() for grey in greys])


def elements(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def infer(
    api: Api, inputs: list[dict[str, Any]], raw: bytes | None = None, *, at: str = "fish", **members: Any
) -> httpx.Response:
    """`raw`: bytes after the JSON, whose length the header declares."""
    head = json.dumps({"inputs": inputs, **members}).encode()
    headers = {} if raw is None else {LENGTH: str(len(head))}
    return api.http.post(f"/v2/models/{at}/infer", content=head + (raw or b""), headers=headers)


def outputs(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["outputs"]}


# --- metadata and health ----------------------------------------------------------------------------------------------


def test_the_server_and_its_health(api: Api) -> None:
    told = api.http.get("/v2").json()
    assert told["name"] == "lensrack"
    assert {"binary_tensor_data", "classification", "model_repository"} <= set(told["extensions"])
    assert api.http.get("/v2/health/live").json() == {"live": True}
    assert api.http.get("/v2/health/ready").json() == {"ready": True}
    api.ready["ready"] = False
    try:
        answer = api.http.get("/v2/health/ready")
    finally:
        api.ready["ready"] = True
    assert (answer.status_code, answer.json()) == (503, {"ready": False})


def test_a_model_is_a_task_and_tells_its_tensors_and_versions(api: Api) -> None:
    first = api.floor.store.aliases("birds")["live"].targets[0].version
    told = api.http.get("/v2/models/birds").json()
    assert (told["name"], told["platform"], told["versions"]) == ("birds", "lensrack", [first])
    assert {one["name"]: (one["datatype"], one["shape"]) for one in told["inputs"]} == {
        "image": ("BYTES", [-1]), "pixels": ("UINT8", [-1, -1, -1, 3]), "tensor": ("FP32", [-1, 3, SIZE, SIZE]),
    }  # fmt: skip
    assert {one["name"]: (one["datatype"], one["shape"]) for one in told["outputs"]} == {
        "logits": ("FP32", [-1, 4]), "probabilities": ("FP32", [-1, 4]), "label": ("BYTES", [-1]),
    }  # fmt: skip
    for version in (first, first[:12], "live"):
        assert api.http.get(f"/v2/models/birds/versions/{version}").json() == told
        assert api.http.get(f"/v2/models/birds/versions/{version}/ready").json() == {"name": "birds", "ready": True}


@pytest.mark.parametrize("tail", ["", "/ready"])
def test_what_is_not_there_is_not_ready(api: Api, tail: str) -> None:
    for path, code in (
        ("/v2/models/nobody", "task_not_found"),
        ("/v2/models/fish/versions/1", "alias_not_found"),
        (f"/v2/models/fish/versions/{'0' * 64}", "version_not_found"),
        ("/v2/models/fish/versions/00000000", "version_not_found"),
    ):
        assert_refused(api.http.get(path + tail), 404, code)
    assert_refused(api.http.get("/v2/models/No%20Such" + tail), 400, "bad_task_name")


def test_paths_and_methods_that_are_not_there_fail_in_the_protocols_words(api: Api) -> None:
    assert_refused(api.http.get("/v2/nowhere"), 404, "not_found")
    assert_refused(api.http.get("/v2/models/fish/infer"), 405, "method_not_allowed")
    assert_refused(api.http.get("/v2/models/fish/versions/live/stats"), 404, "not_found")


def test_the_repository(api: Api) -> None:
    version = api.floor.store.aliases("fish")["live"].targets[0].version
    for sent in ({"json": {"ready": True}}, {}):
        listed = api.http.post("/v2/repository/index", **sent).json()
        assert {"name": "fish", "version": version, "state": "READY", "reason": ""} in listed
    assert api.http.post("/v2/repository/models/fish/load", json={}).content == b""
    assert api.floor.shelf.resident("fish", version)
    assert api.http.post(
        "/v2/repository/models/fish/unload", json={"parameters": {"unload_dependents": True}}
    ).is_success
    assert not api.floor.shelf.resident("fish", version)
    assert infer(api, [image(1)]).is_success, "unloading frees memory, it does not end the service"
    config = {"parameters": {"config": "{}"}}
    assert_refused(api.http.post("/v2/repository/models/fish/load", json=config), 422, "invalid_request")
    assert_refused(api.http.post("/v2/repository/models/fish/load", content=b"[]"), 400, "bad_request")
    assert_refused(api.http.post("/v2/repository/models/fish/load", content=b"{" * 9000), 400, "bad_request")
    for verb in ("load", "unload"):
        assert_refused(api.http.post(f"/v2/repository/models/nobody/{verb}"), 404, "task_not_found")


# --- inference --------------------------------------------------------------------------------------------------------


def test_an_answer_has_all_outputs_and_is_what_predict_says(api: Api) -> None:
    answer = infer(api, [image(7, 8)], id="mine", parameters={"custom": "thing"})
    told, found = answer.json(), outputs(answer)
    assert (told["id"], told["model_name"]) == ("mine", "fish")
    assert told["model_version"] == answer.headers["lensrack-version"]
    assert "decode;dur=" in answer.headers["server-timing"]
    assert [(one["datatype"], one["shape"]) for one in found.values()] == [
        ("FP32", [2, 3]), ("FP32", [2, 3]), ("BYTES", [2]),
    ]  # fmt: skip
    logits = np.array(found["logits"]["data"]).reshape(2, 3)
    scores = np.array(found["probabilities"]["data"]).reshape(2, 3)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores, softmax, rtol=1e-6)
    for at, grey in enumerate((7, 8)):
        plain = api.http.post("/predict/fish", content=png(grey), headers={"content-type": "image/png"}).json()
        assert plain["version"] == told["model_version"]
        for best in plain["predictions"][0]:
            assert scores[at, best["index"]] == pytest.approx(best["score"], rel=1e-6)
        assert found["label"]["data"][at] == plain["predictions"][0][0]["label"]


def test_every_way_to_send_a_picture_gives_the_same_answer(api: Api) -> None:
    """Encoded or decoded, in JSON or behind it, flat or nested, in a batch of elements or alone."""
    grey = np.full((1, SIZE, SIZE, 3), 9, np.uint8)
    expected = outputs(infer(api, [image(9)]))
    raw, shape = png(9), [1, SIZE, SIZE, 3]
    sent: list[tuple[dict[str, Any], bytes | None]] = [
        (tensor("image", "BYTES", [1], binary_data_size=len(raw) + 4), elements(raw)),
        (tensor("image", "BYTES", [1, 1], binary_data_size=len(raw) + 4), elements(raw)),
        (tensor("image", "BYTES", [1, 1], [[base64.b64encode(raw).decode()]]), None),
        (tensor("pixels", "UINT8", shape, grey.tolist()), None),
        (tensor("pixels", "UINT8", shape, grey.ravel().tolist()), None),
        (tensor("pixels", "UINT8", shape, grey.ravel().astype(float).tolist()), None),
        (tensor("pixels", "UINT8", shape, binary_data_size=grey.size), grey.tobytes()),
        (tensor("tensor", "FP32", [1, 3, SIZE, SIZE], [9] * grey.size), None),
        (tensor("tensor", "FP32", [1, 3, SIZE, SIZE], binary_data_size=4 * grey.size), grey.astype("<f4").tobytes()),
    ]
    for one, behind in sent:
        assert outputs(infer(api, [one], behind)) == expected, one["name"]


def test_outputs_come_as_they_are_asked_for(api: Api) -> None:
    wanted = [{"name": "label"}, {"name": "probabilities", "parameters": {"binary_data": True}}]
    answer = infer(api, [image(7, 8)], outputs=wanted, at="birds")
    length = int(answer.headers[LENGTH])
    assert answer.headers["content-type"] == "application/octet-stream"
    label, scores = json.loads(answer.content[:length])["outputs"]
    assert "data" not in scores
    assert scores["parameters"] == {"binary_data_size": 2 * 4 * 4}
    assert len(answer.content) == length + 32
    numbers = np.frombuffer(answer.content[length:], "<f4").reshape(2, 4)
    np.testing.assert_allclose(numbers.sum(axis=1), 1, rtol=1e-6)
    assert label["data"] == [("crow", "sparrow", "ümläut", "owl")[index] for index in numbers.argmax(axis=1)]
    every = infer(api, [image(7)], parameters={"binary_data_output": True}, at="birds")
    parts = json.loads(every.content[: int(every.headers[LENGTH])])["outputs"]
    sizes = [one["parameters"]["binary_data_size"] for one in parts]
    assert sum(sizes) == len(every.content) - int(every.headers[LENGTH])
    assert every.content[-sizes[-1] :] == elements(label["data"][0].encode())


@pytest.mark.parametrize(("classes", "count"), [(1, 1), (3, 3), (99, 4)])
@pytest.mark.parametrize("name", ["logits", "probabilities"])
def test_classification_names_the_best(api: Api, name: str, classes: int, count: int) -> None:
    asked = [{"name": name, "parameters": {"classification": classes}}]
    found = outputs(infer(api, [image(7, 8)], outputs=asked, at="birds"))[name]
    assert (found["datatype"], found["shape"]) == ("BYTES", [2, count])
    plain = outputs(infer(api, [image(7, 8)], at="birds"))[name]
    numbers = np.array(plain["data"]).reshape(2, 4)
    for row, texts in zip(numbers, np.array(found["data"]).reshape(2, count), strict=True):
        split = [text.split(":") for text in texts]
        assert [int(index) for _, index, _ in split] == list(np.argsort(-row)[:count])
        for score, index, label in split:
            assert float(score) == pytest.approx(row[int(index)], abs=1e-6)
            assert label == ("crow", "sparrow", "ümläut", "owl")[int(index)]


def test_versions_and_canaries(api: Api) -> None:
    store = api.floor.store
    first = publish(store, "ants", seed=1)
    second = publish(store, "ants", seed=2)
    store.set_alias("ants", "old", first)
    for name, version in ((first, first), (first[:10], first), ("old", first), ("live", second), (second, second)):
        assert infer(api, [image(1)], at=f"ants/versions/{name}").json()["model_version"] == version
    assert infer(api, [image(1)], at="ants").json()["model_version"] == second
    assert set(api.http.get("/v2/models/ants").json()["versions"]) == {first, second}
    store.set_alias("ants", "live", {first: 0.5, second: 0.5})
    for key in ("x", "y", "z"):
        sent = {"json": {"inputs": [image(1)]}, "headers": {"Lensrack-Key": key}}
        answers = {api.http.post("/v2/models/ants/infer", **sent).json()["model_version"] for _ in range(3)}
        assert len(answers) == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_unpacked_within_the_cap(api: Api, encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    whole = json.dumps({"inputs": [image(5)]}).encode()
    behind = elements(png(5))
    head = json.dumps({"inputs": [tensor("image", "BYTES", [1], binary_data_size=len(behind))]}).encode()

    def send(content: bytes, **headers: str) -> httpx.Response:
        told = {"Content-Encoding": encoding, **headers}
        return api.http.post("/v2/models/fish/infer", content=content, headers=told)

    assert outputs(send(pack(whole))) == outputs(infer(api, [image(5)]))
    assert outputs(send(pack(head + behind), **{LENGTH: str(len(head))})) == outputs(infer(api, [image(5)]))
    assert_refused(send(whole), 400, "bad_request")
    assert_refused(send(pack(whole)[:-4]), 400, "bad_request")
    assert_refused(send(pack(whole) + b"more"), 400, "bad_request")
    assert_refused(send(pack(b" " * 400_001)), 413, "body_too_large")
    other = api.http.post("/v2/models/fish/infer", content=whole, headers={"Content-Encoding": "br"})
    assert_refused(other, 415, "unsupported_media_type")


def test_the_timeout_of_a_request_is_in_microseconds(api: Api) -> None:
    api.floor.engine.gate.clear()
    try:
        answer = infer(api, [image(3)], parameters={"timeout": 50_000})
    finally:
        api.floor.engine.gate.set()
    assert "within 0.05 s" in assert_refused(answer, 504, "deadline_exceeded")["error"]


# --- what is refused --------------------------------------------------------------------------------------------------

ONE = [1, 1, 1, 3]
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no input": ({"inputs": []}, 422, "got 0 inputs"),
    "two inputs": ({"inputs": [image(1), image(1)]}, 422, "got 2 inputs"),
    "inputs are no list": ({"inputs": {}}, 422, "inputs: "),
    "inputs are missing": ({}, 422, "inputs: "),
    "an unknown input": ({"inputs": [tensor("x", "BYTES", [1], ["YQ=="])]}, 422, "image, pixels, tensor, got 'x'"),
    "another datatype": ({"inputs": [tensor("image", "UINT8", [1], [1])]}, 422, "expected datatype BYTES, got 'UINT8'"),
    "no datatype": ({"inputs": [{"name": "image", "shape": [1], "data": ["YQ=="]}]}, 422, "inputs.0.datatype"),
    "too few sides": ({"inputs": [tensor("pixels", "UINT8", [1, 1, 3], [1, 2, 3])]}, 422, "[-1, -1, -1, 3]"),
    "four channels": ({"inputs": [tensor("pixels", "UINT8", [1, 1, 1, 4], [1] * 4)]}, 422, "[-1, -1, -1, 3]"),
    "channels first": ({"inputs": [tensor("tensor", "FP32", [1, 8, 8, 3], [1] * 192)]}, 422, "[-1, 3, -1, -1]"),
    "another size": ({"inputs": [tensor("tensor", "FP32", [1, 3, 4, 4], [1] * 48)]}, 422, "[3, 8, 8], got [3, 4, 4]"),
    "no image": ({"inputs": [tensor("image", "BYTES", [0], [])]}, 422, "of 1 or more"),
    "a side of 0": ({"inputs": [tensor("pixels", "UINT8", [1, 0, 1, 3], [])]}, 422, "of 1 or more"),
    "a negative side": ({"inputs": [tensor("pixels", "UINT8", [1, -1, -1, 3], [1, 2, 3])]}, 422, "inputs.0.shape"),
    "a side as text": ({"inputs": [tensor("image", "BYTES", ["1"], ["YQ=="])]}, 422, "inputs.0.shape.0"),  # type: ignore[list-item]
    "a fraction of a side": ({"inputs": [tensor("image", "BYTES", [1.0], ["YQ=="])]}, 422, "inputs.0.shape.0"),  # type: ignore[list-item]
    "too many images": ({"inputs": [image(*range(5))]}, 422, "up to 4, got [5]"),
    "a product that overflows": ({"inputs": [tensor("pixels", "UINT8", [2, 2**62, 2, 3], [])]}, 400, "values, got 0"),
    "a side that overflows": ({"inputs": [tensor("pixels", "UINT8", [1, 2**63, 1, 3], [])]}, 422, "inputs.0.shape.1"),
    "many empty images": ({"inputs": [tensor("pixels", "UINT8", [10**9, 0, 0, 3], [])]}, 422, "of 1 or more"),
    "no data": ({"inputs": [tensor("image", "BYTES", [1])]}, 400, "got no data"),
    "too little data": ({"inputs": [tensor("pixels", "UINT8", ONE, [1, 2])]}, 400, "has 3 values, got 2"),
    "too much data": ({"inputs": [tensor("image", "BYTES", [1], ["YQ==", "YQ=="])]}, 400, "has 1 values, got 2"),
    "nested another way": ({"inputs": [tensor("pixels", "UINT8", [1, 1, 2, 3], [[[[1] * 6]]])]}, 400, "nested"),
    "nested here and there": ({"inputs": [tensor("pixels", "UINT8", ONE, [[[1, 2, 3]], 4])]}, 400, "nested"),
    "numbers as text": ({"inputs": [tensor("pixels", "UINT8", ONE, ["1", "2", "3"])]}, 422, "expected numbers"),
    "numbers that are null": ({"inputs": [tensor("tensor", "FP32", [1, 3, 1, 1], [1, None, 2])]}, 422, "numbers"),
    "a byte of 256": ({"inputs": [tensor("pixels", "UINT8", ONE, [1, 2, 256])]}, 422, "from 0 to 255"),
    "a byte of -1": ({"inputs": [tensor("pixels", "UINT8", ONE, [1, 2, -1])]}, 422, "from 0 to 255"),
    "half a byte": ({"inputs": [tensor("pixels", "UINT8", ONE, [1, 2, 0.5])]}, 422, "from 0 to 255"),
    "a number beyond floats": ({"inputs": [tensor("pixels", "UINT8", ONE, [1, 2, 10**400])]}, 422, "expected numbers"),
    "no base64": ({"inputs": [tensor("image", "BYTES", [1], ["öl"])]}, 422, "element 0: expected base64"),
    "numbers for base64": ({"inputs": [tensor("image", "BYTES", [1], [7])]}, 422, "element 0: expected base64"),
    "no picture": ({"inputs": [tensor("image", "BYTES", [1], ["YWJj"])]}, 415, "expected an image"),
    "shared memory": ({"inputs": [tensor("image", "BYTES", [1], shared_memory_region="r")]}, 422, "shared memory"),
    "a size without bytes": ({"inputs": [tensor("image", "BYTES", [1], binary_data_size=5)]}, 400, "0 bytes are left"),
    "a size as text": ({"inputs": [tensor("image", "BYTES", [1], binary_data_size="5")]}, 422, "binary_data_size"),
    "an unknown output": ({"inputs": [image(1)], "outputs": [{"name": "x"}]}, 422, "logits, probabilities, label"),
    "an output twice": ({"inputs": [image(1)], "outputs": [{"name": "label"}] * 2}, 422, "each once"),
    "classes of labels": (
        {"inputs": [image(1)], "outputs": [{"name": "label", "parameters": {"classification": 1}}]},
        422,
        "classes of logits",
    ),
    "-1 classes": (
        {"inputs": [image(1)], "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
        422,
        "parameters.classification",
    ),
    "a flag that is none": ({"inputs": [image(1)], "parameters": {"binary_data_output": "yes"}}, 422, "true or false"),
    "a timeout that is none": ({"inputs": [image(1)], "parameters": {"timeout": -1}}, 422, "parameters.timeout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(api: Api, case: str) -> None:
    sent, status, words = REFUSED[case]
    code = {400: "bad_request", 415: "unsupported_image"}.get(status, "invalid_request")
    answer = api.http.post("/v2/models/fish/infer", json=sent)
    assert words in assert_refused(answer, status, code)["error"]
    assert len(answer.content) < 1000


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "1e39", "1001"])
def test_numbers_that_no_normalised_picture_has_are_refused(api: Api, bad: str) -> None:
    data = ",".join([bad] + ["0"] * (3 * SIZE * SIZE - 1))
    shape = f"[1, 3, {SIZE}, {SIZE}]"
    text = f'{{"inputs": [{{"name": "tensor", "datatype": "FP32", "shape": {shape}, "data": [{data}]}}]}}'
    answer = api.http.post("/v2/models/fish/infer", content=text)
    assert "from -1000 to 1000" in assert_refused(answer, 422, "invalid_request")["error"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"inputs": ' + b"[" * 5000])
def test_bad_json(api: Api, text: bytes) -> None:
    answer = api.http.post("/v2/models/fish/infer", content=text)
    assert answer.status_code in (400, 422)
    assert_refused(answer, answer.status_code, answer.headers["lensrack-code"])


def test_sizes_that_lie(api: Api) -> None:
    raw = elements(png(1))
    one = tensor("image", "BYTES", [1], binary_data_size=len(raw))
    assert infer(api, [one], raw).is_success
    assert "bytes are left" in assert_refused(infer(api, [one], raw[:-1]), 400, "bad_request")["error"]
    assert "after the JSON" in assert_refused(infer(api, [one], raw + b"x"), 400, "bad_request")["error"]
    two = tensor("image", "BYTES", [2], binary_data_size=len(raw))
    assert "its bytes end after 1" in assert_refused(infer(api, [two], raw), 400, "bad_request")["error"]
    more = tensor("image", "BYTES", [1], binary_data_size=2 * len(raw))
    assert "are left after its 1" in assert_refused(infer(api, [more], 2 * raw), 400, "bad_request")["error"]
    longer = struct.pack("<I", 2**32 - 1) + raw[4:]
    assert "element 0 has 4294967295" in assert_refused(infer(api, [one], longer), 400, "bad_request")["error"]
    few = tensor("pixels", "UINT8", [1, 2, 2, 3], binary_data_size=11)
    assert "takes 12 bytes, got 11" in assert_refused(infer(api, [few], b"x" * 11), 400, "bad_request")["error"]
    twice = tensor("image", "BYTES", [1], ["YQ=="], binary_data_size=len(raw))
    assert "data twice" in assert_refused(infer(api, [twice], raw), 400, "bad_request")["error"]


@pytest.mark.parametrize("told", ["-1", "x", "1e3", "99999", "9" * 40, "1.0", ""])
def test_a_length_of_the_json_that_lies(api: Api, told: str) -> None:
    content = json.dumps({"inputs": [image(1)]}).encode()
    answer = api.http.post("/v2/models/fish/infer", content=content, headers={LENGTH: told})
    assert LENGTH in assert_refused(answer, 400, "bad_request")["error"]


def test_a_length_that_cuts_the_json(api: Api) -> None:
    content = json.dumps({"inputs": [image(1)]}).encode()
    answer = api.http.post("/v2/models/fish/infer", content=content, headers={LENGTH: "20"})
    assert "JSON" in assert_refused(answer, 400, "bad_request")["error"]


def test_a_body_beyond_the_cap(api: Api) -> None:
    assert_refused(api.http.post("/v2/models/fish/infer", content=b"x" * 400_001), 413, "body_too_large")


def test_unknown_models_and_versions(api: Api) -> None:
    assert_refused(infer(api, [image(1)], at="nobody"), 404, "task_not_found")
    assert_refused(infer(api, [image(1)], at="fish/versions/1"), 404, "alias_not_found")
    assert_refused(infer(api, [image(1)], at=f"fish/versions/{'0' * 64}"), 404, "version_not_found")
    assert_refused(infer(api, [image(1)], at="fish/versions/live+live"), 404, "alias_not_found")


# --- properties -------------------------------------------------------------------------------------------------------

GEOMETRIES = st.builds(
    Geometry,
    st.sampled_from([8, 17]),
    st.sampled_from(["bilinear", "bicubic"]),
    st.sampled_from([0.875, 1.0]),
    st.sampled_from(["center", "squash", "border"]),
)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), GEOMETRIES)
def test_pixels_are_cut_as_the_picture_would_be(width: int, height: int, seed: int, geometry: Geometry) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    expected = pixels(file.getvalue(), geometry, max_pixels=10_000)
    np.testing.assert_array_equal(of_picture(picture, geometry, max_pixels=10_000), expected)
    np.testing.assert_array_equal(model_input(DecodedImage(picture), geometry, 10_000), expected)


HEAD = json.dumps({"inputs": [tensor("image", "BYTES", [2], binary_data_size=30)], "outputs": [{"name": "label"}]})


@given(st.data())
def test_no_body_breaks_the_reader(data: st.DataObject) -> None:
    """Whatever bytes come, they are read or refused in words."""
    whole = bytearray(HEAD.encode() + elements(b"abc", b"x" * 19))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    length = data.draw(st.integers(0, len(whole)) | st.just(min(len(HEAD), len(whole))))
    read, status = 1, 400
    try:
        read = len(body.parse(bytes(whole), length, 4).images)
    except ServiceError as error:
        status = error.status
    assert 1 <= read <= 4
    assert 400 <= status < 500
