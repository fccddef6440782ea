"""The clients that people have of other servers, as published, against this one over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.api.api_server import Api, serving
from tests.serving.floor import SIZE, png, publish

triton = pytest.importorskip("tritonclient.http", reason="pip install tritonclient[http]")
triton_aio = pytest.importorskip("tritonclient.http.aio", reason="pip install tritonclient[http]")

Failed = triton.InferenceServerException
TOKEN = "token-of-mine-" + "x" * 20
KEY = {"id": "mine", "scopes": ["predict"], "token": TOKEN, "tasks": "acme-", "images_per_s": 0.1}  # 6 in a minute


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as api:
        publish(api.floor.store, "fish")
        publish(api.floor.store, "birds", labels=("crow", "sparrow", "gull", "owl"))
        yield api


@pytest.fixture
def client(api: Api) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{api.port}", network_timeout=20) as client:
        yield client


def given(name: str, datatype: str, values: np.ndarray, **how: Any) -> Any:
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values, **how)
    return tensor


def best(api: Api, grey: int) -> bytes:
    """The label, as our own interface tells it."""
    told = api.http.post("/predict/fish", content=png(grey), headers={"content-type": "image/png"}).json()
    return str(told["predictions"][0][0]["label"]).encode()


def files(*greys: int) -> Any:
    return given("image", "BYTES", np.array([png(grey) for grey in greys], np.object_))


def test_metadata_readiness_and_the_repository(api: Api, client: Any) -> None:
    version = api.floor.store.aliases("fish")["live"].targets[0].version
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "lensrack"
    assert client.is_model_ready("fish")
    assert client.is_model_ready("fish", version)
    assert client.is_model_ready("fish", "live")
    assert not client.is_model_ready("fish", "7")
    assert not client.is_model_ready("nobody")
    assert client.get_model_metadata("fish", version[:8])["versions"] == [version]
    assert {"fish", "birds"} <= {one["name"] for one in client.get_model_repository_index()}
    client.load_model("fish")
    assert api.floor.shelf.resident("fish", version)
    client.unload_model("fish")
    assert not api.floor.shelf.resident("fish", version)
    with pytest.raises(Failed, match="expected none, models come from the store"):
        client.load_model("fish", config="{}")


def test_bytes_pixels_and_tensors_in_binary_and_in_json(api: Api, client: Any) -> None:
    grey = np.full((2, SIZE, SIZE, 3), 9, np.uint8)
    ready = np.full((2, 3, SIZE, SIZE), 9, np.float32)
    expected = client.infer("fish", [files(9, 9)])
    assert expected.get_response()["model_version"]
    assert expected.as_numpy("logits").dtype == np.float32
    assert expected.as_numpy("label").tolist() == [best(api, 9)] * 2
    for tensor in (
        given("pixels", "UINT8", grey),
        given("pixels", "UINT8", grey, binary_data=False),
        given("tensor", "FP32", ready),
        given("tensor", "FP32", ready, binary_data=False),
    ):
        told = client.infer("fish", [tensor])
        for name in ("logits", "probabilities", "label"):
            np.testing.assert_array_equal(told.as_numpy(name), expected.as_numpy(name))


def test_outputs_ids_versions_and_parameters(api: Api, client: Any) -> None:
    version = api.floor.store.aliases("birds")["live"].targets[0].version
    asked = [
        triton.InferRequestedOutput("probabilities", binary_data=False),
        triton.InferRequestedOutput("logits", class_count=2),
        triton.InferRequestedOutput("label"),
    ]
    told = client.infer(
        "birds", [files(1, 2)], version[:10], asked, request_id="mine", timeout=20_000_000, parameters={"own": "word"}
    )
    response = told.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("mine", "birds", version)
    assert [one["name"] for one in response["outputs"]] == ["probabilities", "logits", "label"]
    best = told.as_numpy("logits")
    assert best.shape == (2, 2)
    score, index, label = best[0, 0].decode().split(":")
    assert label.encode() == told.as_numpy("label")[0]
    assert told.as_numpy("probabilities")[0].argmax() == int(index)
    assert float(score) > float(best[0, 1].decode().split(":")[0])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed(client: Any, algorithm: str) -> None:
    told = client.infer(
        "fish", [files(9)], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    np.testing.assert_array_equal(told.as_numpy("logits"), client.infer("fish", [files(9)]).as_numpy("logits"))


def test_in_flight_together(client: Any, api: Api) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{api.port}", concurrency=4, network_timeout=20) as many:
        waiting = [many.async_infer("fish", [files(grey)]) for grey in range(8)]
        for grey, one in enumerate(waiting):
            alone = client.infer("fish", [files(grey)])
            np.testing.assert_array_equal(one.get_result().as_numpy("logits"), alone.as_numpy("logits"))


def test_failures_are_sentences_with_a_status(client: Any) -> None:
    for ask, status, words in (
        (lambda: client.infer("nobody", [files(1)]), "404", "nobody"),
        (lambda: client.infer("fish", [files(1)], "7"), "404", "'7'|alias"),
        (lambda: client.infer("fish", [files(1), files(1)]), "422", "got 2 inputs"),
        (lambda: client.infer("fish", [given("pixels", "UINT8", np.zeros((1, 2, 2, 4), np.uint8))]), "422", "shape"),
        (
            lambda: client.infer("fish", [given("image", "FP32", np.zeros((1,), np.float32))]),
            "422",
            "got 'FP32'",
        ),
        (lambda: client.infer("fish", [files(1)], outputs=[triton.InferRequestedOutput("x")]), "422", "'x'"),
        (lambda: client.get_model_metadata("nobody"), "404", "nobody"),
        (client.get_inference_statistics, "404", "stats"),
    ):
        with pytest.raises(Failed, match=words) as failed:
            ask()
        assert failed.value.status() == status


def test_from_asyncio(api: Api) -> None:
    async def ask() -> tuple[bool, bytes, str]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{api.port}") as client:
            ready = await client.is_model_ready("fish")
            told = await client.infer("fish", [files(9)])
            with pytest.raises(Failed) as failed:
                await client.infer("nobody", [files(9)])
            return ready, told.as_numpy("label")[0], failed.value.message()

    ready, label, words = asyncio.run(ask())
    assert (ready, label) == (True, best(api, 9))
    assert "nobody" in words


def test_with_a_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A key sees its own tasks; of the others it is told that they do not exist."""
    home = tmp_path_factory.mktemp("keys")
    (home / "keys").write_text(json.dumps(KEY))
    with serving(home, keys_file=home / "keys") as api:
        publish(api.floor.store, "acme-fish")
        publish(api.floor.store, "zeta-fish")
        with triton.InferenceServerClient(f"127.0.0.1:{api.port}", network_timeout=20) as client:
            assert client.is_server_ready()
            with pytest.raises(Failed, match="expected an API key") as failed:
                client.infer("acme-fish", [files(1)])
            assert failed.value.status() == "401"
            mine = {"Authorization": f"Bearer {TOKEN}"}
            assert client.infer("acme-fish", [files(1)], headers=mine).as_numpy("label").shape == (1,)
            assert [one["name"] for one in client.get_model_repository_index(headers=mine)] == ["acme-fish"]
            assert not client.is_model_ready("zeta-fish", headers=mine)
            with pytest.raises(Failed, match="zeta-fish"):
                client.infer("zeta-fish", [files(1)], headers=mine)
            with pytest.raises(Failed, match="needs the scope 'admin'"):
                client.unload_model("acme-fish", headers=mine)
            with pytest.raises(Failed, match="this key may send") as limited:
                client.infer("acme-fish", [files(*range(6))], headers=mine)
            assert limited.value.status() == "429"
