"""The Open Inference Protocol over gRPC: Triton's client as published, and messages that it would never send."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.api.api_server import Api, serving
from tests.serving.floor import SIZE, png, publish

grpc = pytest.importorskip("grpc", reason="pip install grpcio")
triton = pytest.importorskip("tritonclient.grpc", reason="pip install tritonclient[grpc]")
triton_aio = pytest.importorskip("tritonclient.grpc.aio", reason="pip install tritonclient[grpc]")

from server.api import scopes  # noqa: E402
from server.api.oip.grpc import messages  # noqa: E402
from server.api.oip.grpc.calls import CALLS  # noqa: E402

Failed = triton.InferenceServerException
FOLDER = Path(messages.__file__).parent
TOKENS = {name: f"token-of-{name}-{'x' * 20}" for name in ("acme", "train")}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), grpc=True, max_body_bytes=100_000, max_images=4) as api:
        publish(api.floor.store, "fish")
        publish(api.floor.store, "birds", labels=("crow", "sparrow", "ümläut", "owl"))
        yield api


@pytest.fixture
def client(api: Api) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{api.grpc_port}") as client:
        yield client


@pytest.fixture
def channel(api: Api) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{api.grpc_port}") as channel:
        yield channel


def given(name: str, datatype: str, values: np.ndarray) -> Any:
    tensor = triton.InferInput(name, list(values.shape), datatype)
    return tensor.set_data_from_numpy(values)


def files(*greys: int) -> Any:
    return given("image", "BYTES", np.array([png(grey) for grey in greys], np.object_))


def call(channel: Any, name: str, request: Any, **how: Any) -> Any:
    """With our own messages: what no client would send can be sent."""
    asked, answered = messages.methods()[name]
    ask = channel.unary_unary(f"/{messages.SERVICE}/{name}", asked.SerializeToString, answered.FromString)
    return ask(request, timeout=20, **how)


def infer(channel: Any, *inputs: dict[str, Any], **members: Any) -> Any:
    request = messages.message("ModelInferRequest")(model_name="fish", **members)
    for one in inputs:
        request.inputs.add(**one)
    return call(channel, "ModelInfer", request)


# --- as published -----------------------------------------------------------------------------------------------------


def test_the_description_is_what_the_file_says(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="pip install grpcio-tools")
    out = tmp_path / "out.pb"
    ask = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={out}", "open_inference.proto"]
    subprocess.run(ask, cwd=FOLDER, check=True, timeout=60)
    assert out.read_bytes() == messages.DESCRIPTION.read_bytes(), "run `make proto`"


def test_names_and_numbers_are_the_published_ones() -> None:
    """Field by field, against the description that Triton's client brings."""
    from tritonclient.grpc import service_pb2

    def fields(message: Any) -> dict[str, Any]:
        kinds = {one.name: fields(one) for one in message.nested_types}
        return {one.name: (one.number, one.type, one.is_repeated) for one in message.fields} | kinds

    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert messages.methods().keys() == CALLS.keys()
    for name, (asked, answered) in messages.methods().items():
        assert fields(asked.DESCRIPTOR) == fields(theirs[name].input_type), name
        assert fields(answered.DESCRIPTOR) == fields(theirs[name].output_type), name
    parts = ("InferParameter", "InferTensorContents", "ModelRepositoryParameter")
    for part in parts:
        their_part = service_pb2.DESCRIPTOR.message_types_by_name[part]
        assert fields(messages.message(part).DESCRIPTOR) == fields(their_part), part


def test_every_call_needs_what_its_route_needs() -> None:
    assert {(method, route) for _, method, route in CALLS.values()} <= scopes.NEEDS.keys()


# --- Triton's client --------------------------------------------------------------------------------------------------


def test_metadata_readiness_and_the_repository(api: Api, client: Any) -> None:
    version = api.floor.store.aliases("fish")["live"].targets[0].version
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "lensrack"
    assert client.is_model_ready("fish", version)
    assert client.is_model_ready("fish", "live")
    told = client.get_model_metadata("fish", version[:8], as_json=True)
    over_http = api.http.get("/v2/models/fish").json()
    assert told["versions"] == over_http["versions"] == [version]
    for side in ("inputs", "outputs"):
        assert [(one["name"], one["datatype"]) for one in told[side]] == [
            (one["name"], one["datatype"]) for one in over_http[side]
        ]
    assert {"fish", "birds"} <= {one.name for one in client.get_model_repository_index().models}
    client.load_model("fish")
    assert api.floor.shelf.resident("fish", version)
    client.unload_model("fish")
    assert not api.floor.shelf.resident("fish", version)
    api.ready["ready"] = False
    try:
        assert not client.is_server_ready()
    finally:
        api.ready["ready"] = True


def test_it_answers_as_http_does(api: Api, client: Any) -> None:
    grey = np.full((2, SIZE, SIZE, 3), 9, np.uint8)
    body = {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": list(grey.shape), "data": grey.tolist()}]}
    over_http = {one["name"]: one for one in api.http.post("/v2/models/birds/infer", json=body).json()["outputs"]}
    ready = np.full((2, 3, SIZE, SIZE), 9, np.float32)
    for tensor in (files(9, 9), given("pixels", "UINT8", grey), given("tensor", "FP32", ready)):
        told = client.infer("birds", [tensor], request_id="mine")
        assert told.get_response().id == "mine"
        for name in ("logits", "probabilities"):
            expected = np.array(over_http[name]["data"], np.float32).reshape(2, 4)
            np.testing.assert_array_equal(told.as_numpy(name), expected)
        assert [one.decode() for one in told.as_numpy("label")] == over_http["label"]["data"]


def test_outputs_versions_and_classification(api: Api, client: Any) -> None:
    version = api.floor.store.aliases("birds")["live"].targets[0].version
    asked = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("logits", class_count=2)]
    told = client.infer("birds", [files(1)], version[:10], asked)
    assert [one.name for one in told.get_response().outputs] == ["label", "logits"]
    assert told.get_response().model_version == version
    _, _, label = told.as_numpy("logits")[0, 0].decode().split(":")
    assert label.encode() == told.as_numpy("label")[0]


def test_failures_have_a_status_and_a_sentence(client: Any) -> None:
    for ask, status, words in (
        (lambda: client.infer("nobody", [files(1)]), "NOT_FOUND", "nobody"),
        (lambda: client.infer("fish", [files(1)], "7"), "NOT_FOUND", "7"),
        (lambda: client.infer("No Name", [files(1)]), "INVALID_ARGUMENT", "task name"),
        (lambda: client.infer("fish", [files(1), files(1)]), "INVALID_ARGUMENT", "got 2 inputs"),
        (lambda: client.infer("fish", [files(*range(5))]), "INVALID_ARGUMENT", "up to 4"),
        (lambda: client.is_model_ready("nobody"), "NOT_FOUND", "nobody"),
        (lambda: client.load_model("fish", config="{}"), "INVALID_ARGUMENT", "come from the store"),
        (lambda: client.infer("fish", [given("image", "BYTES", np.array([b"x" * 200_000], np.object_))]),
         "RESOURCE_EXHAUSTED", "larger than max"),
        (client.get_inference_statistics, "UNIMPLEMENTED", "found"),
    ):  # fmt: skip
        with pytest.raises(Failed, match=words) as failed:
            ask()
        assert failed.value.status() == f"StatusCode.{status}"


def test_a_deadline_ends_the_wait(api: Api, client: Any) -> None:
    api.floor.engine.gate.clear()
    try:
        with pytest.raises(Failed) as failed:
            client.infer("fish", [files(3)], client_timeout=0.2)
        with pytest.raises(Failed, match=r"within 0.05 s") as told:
            client.infer("fish", [files(3)], timeout=50_000)
    finally:
        api.floor.engine.gate.set()
    assert failed.value.status() == told.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_from_asyncio(api: Api) -> None:
    async def ask() -> int:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{api.grpc_port}") as client:
            told = await asyncio.gather(*(client.infer("fish", [files(grey)]) for grey in range(8)))
            return len({one.as_numpy("probabilities").tobytes() for one in told})

    assert asyncio.run(ask()) > 1


# --- messages of one's own --------------------------------------------------------------------------------------------


def test_typed_contents_go_in_and_come_back(channel: Any) -> None:
    grey = [9] * (SIZE * SIZE * 3)
    ways: list[dict[str, Any]] = [
        {"name": "image", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [png(9)]}},
        {"name": "pixels", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3], "contents": {"uint_contents": grey}},
        {"name": "tensor", "datatype": "FP32", "shape": [1, 3, SIZE, SIZE], "contents": {"fp32_contents": grey}},
    ]
    told = [infer(channel, one) for one in ways]
    assert not told[0].raw_output_contents
    assert [len(one.contents.fp32_contents) for one in told[0].outputs[:2]] == [3, 3]
    assert told[0].outputs[2].contents.bytes_contents[0] in (b"a", b"b", b"c")
    assert {one.SerializeToString(deterministic=True) for one in told} == {
        told[0].SerializeToString(deterministic=True)
    }


IMAGE = {"name": "image", "datatype": "BYTES", "shape": [1]}
WRONG: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no data": ([IMAGE], {}, "got no data"),
    "raw for nobody": ([], {"raw_input_contents": [b"x"]}, "one for each of 0 inputs, got 1"),
    "raw for two": ([IMAGE], {"raw_input_contents": [b"x", b"y"]}, "one for each of 1 inputs, got 2"),
    "both": ([{**IMAGE, "contents": {"bytes_contents": [b"x"]}}], {"raw_input_contents": [b"x"]}, "data twice"),
    "contents of another kind": ([{**IMAGE, "contents": {"fp32_contents": [1]}}], {}, "got contents.fp32_contents"),
    "a truncated element": ([IMAGE], {"raw_input_contents": [b"\x09\0\0\0abc"]}, "3 are there"),
    "another datatype": ([{**IMAGE, "datatype": "FP16"}], {"raw_input_contents": [b"x"]}, "expected datatype BYTES"),
    "a negative side": (
        [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 1, 1, 3]}], {"raw_input_contents": [b"x"]}, "1 or more",
    ),
    "sides that overflow": (
        [{"name": "pixels", "datatype": "UINT8", "shape": [1, 2**62, 2, 3]}], {"raw_input_contents": [b"x"]}, "takes",
    ),
    "shared memory": ([{**IMAGE, "parameters": {"shared_memory_region": {"string_param": "r"}}}], {}, "shared memory"),
    "a timeout that is none": ([IMAGE], {"parameters": {"timeout": {"string_param": "1"}}, "raw_input_contents":
        [b"\x01\0\0\0x"]}, "parameters.timeout"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(channel: Any, case: str) -> None:
    inputs, members, words = WRONG[case]
    with pytest.raises(grpc.RpcError) as failed:
        infer(channel, *inputs, **members)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in failed.value.details()
    trailing = dict(failed.value.trailing_metadata())
    assert trailing["lensrack-code"] in ("bad_request", "invalid_request")
    assert trailing["x-request-id"]


def test_bytes_that_are_no_message(channel: Any) -> None:
    ask = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer", bytes, bytes)
    with pytest.raises(grpc.RpcError) as failed:
        ask(b"\xff" * 50, timeout=20)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert failed.value.details() == "expected a message ModelInferRequest, got 50 bytes that are none"
    for path in (f"/{messages.SERVICE}/ModelStreamInfer", "/nobody/ModelInfer", "/x"):
        with pytest.raises(grpc.RpcError) as unknown:
            channel.unary_unary(path, bytes, bytes)(b"", timeout=20)
        assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_calls_are_counted_and_carry_an_id(api: Api, channel: Any) -> None:
    request = messages.message("ServerLiveRequest")()
    asked, answered = messages.methods()["ServerLive"]
    ask = channel.unary_unary(f"/{messages.SERVICE}/ServerLive", asked.SerializeToString, answered.FromString)
    _, done = ask.with_call(request, timeout=20, metadata=(("x-request-id", "mine-1"),))
    assert dict(done.trailing_metadata())["x-request-id"] == "mine-1"
    line = 'lensrack_requests_total{method="GRPC",route="/inference.GRPCInferenceService/ServerLive",status="200"}'
    assert line in api.http.get("/metrics").text


def test_the_unforeseen_says_nothing_of_itself(api: Api, client: Any) -> None:
    tasks = api.floor.store.tasks
    api.floor.store.tasks = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    try:
        with pytest.raises(Failed, match="failed unexpectedly") as failed:
            client.get_model_repository_index()
    finally:
        api.floor.store.tasks = tasks  # type: ignore[method-assign]
    assert failed.value.status() == "StatusCode.INTERNAL"
    assert "division" not in str(failed.value)


def test_without_its_packages_the_setting_is_told_why(monkeypatch: pytest.MonkeyPatch, api: Api) -> None:
    from server.app.services import build_grpc
    from server.errors import NotInstalled

    services = api.services
    assert build_grpc(services, None) is None  # type: ignore[arg-type]  # no port, no front
    wanted = replace(services, settings=services.settings.model_copy(update={"grpc_port": 1}))
    monkeypatch.delitem(sys.modules, "server.api.oip.grpc.server")
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(NotInstalled, match="LENSRACK_GRPC_PORT needs the extra `grpc`"):
        build_grpc(wanted, None)  # type: ignore[arg-type]


def test_a_taken_port_is_told(api: Api) -> None:
    from server.api.oip.grpc.server import GrpcServer

    async def start() -> None:
        await GrpcServer(lambda key: api.services, None, api.services.settings, api.grpc_port).start()  # type: ignore[arg-type]

    with pytest.raises(OSError, match="LENSRACK_GRPC_PORT: cannot listen"):
        asyncio.run(start())


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_and_tenancy(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("keys")
    rows = [
        {"id": "acme", "scopes": ["predict"], "token": TOKENS["acme"], "tasks": "acme-", "images_per_s": 0.1},
        {"id": "train", "scopes": ["train"], "token": TOKENS["train"]},
    ]
    (home / "keys").write_text("\n".join(map(json.dumps, rows)))
    with serving(home, grpc=True, keys_file=home / "keys") as api:
        publish(api.floor.store, "acme-fish")
        publish(api.floor.store, "zeta-fish")
        mine, other, wrong = (
            {"headers": {"authorization": f"Bearer {token}"}} for token in (TOKENS["acme"], TOKENS["train"], "wrong")
        )
        with triton.InferenceServerClient(f"127.0.0.1:{api.grpc_port}") as client:
            assert client.is_server_ready()
            assert client.infer("acme-fish", [files(1)], **mine).as_numpy("label").shape == (1,)
            assert [one.name for one in client.get_model_repository_index(**mine).models] == ["acme-fish"]
            for ask, status in (
                (lambda: client.infer("acme-fish", [files(1)]), "UNAUTHENTICATED"),
                (lambda: client.get_server_metadata(**wrong), "UNAUTHENTICATED"),
                (lambda: client.infer("acme-fish", [files(1)], **other), "PERMISSION_DENIED"),
                (lambda: client.unload_model("acme-fish", **mine), "PERMISSION_DENIED"),
                (lambda: client.infer("acme-fish", [files(*range(6))], **mine), "RESOURCE_EXHAUSTED"),
                (lambda: client.infer("zeta-fish", [files(1)], **mine), "NOT_FOUND"),
                (lambda: client.get_model_metadata("zeta-fish", **mine), "NOT_FOUND"),
            ):
                with pytest.raises(Failed) as failed:
                    ask()
                assert failed.value.status() == f"StatusCode.{status}"
