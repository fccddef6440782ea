"""KServe's own inference clients against a server, in a process and an environment of their own: prints what they got.

Arguments: the port of HTTP, the port of gRPC, a file of a picture.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from PIL import Image


def request(name: str, datatype: str, values: np.ndarray, binary: bool, outputs: Any = None) -> InferRequest:
    tensor = InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    how = {"binary_data_output": True} if binary else {}
    return InferRequest("digits", [tensor], request_outputs=outputs, parameters=how)


def told(response: Any) -> dict[str, Any]:
    found = {one.name: one.as_numpy() for one in response.outputs}
    label = found["label"].ravel()[0]
    best = label.decode() if isinstance(label, bytes) else str(label)
    return {"version": response.model_version, "label": best, "probabilities": found["probabilities"].ravel().tolist()}


async def over_http(url: str, file: bytes, pixels: np.ndarray) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=20))
    health = [await client.is_server_live(url), await client.is_server_ready(url)]
    health += [await client.is_model_ready(url, name) for name in ("digits", "nobody")]
    told_of: dict[str, Any] = {"health": health}
    files = np.array([file], np.object_)
    told_of["bytes"] = told(await client.infer(url, request("image", "BYTES", files, True), model_name="digits"))
    for binary in (True, False):
        asked = request("pixels", "UINT8", pixels, binary)
        told_of[f"pixels {binary}"] = told(await client.infer(url, asked, model_name="digits"))
    try:
        await client.infer(url, request("pixels", "UINT8", pixels, True), model_name="nobody")
    except httpx.HTTPStatusError as error:
        told_of["failure"] = str(error)
    await client.close()
    return told_of


async def over_grpc(port: str, file: bytes, pixels: np.ndarray) -> dict[str, Any]:
    async with InferenceGRPCClient(f"127.0.0.1:{port}", timeout=20) as client:
        health = [await client.is_server_live(), await client.is_server_ready(), await client.is_model_ready("digits")]
        files = np.array([file], np.object_)
        asked = request("image", "BYTES", files, True), request("pixels", "UINT8", pixels, False)
        return {"health": health, "answers": [told(await client.infer(one)) for one in asked]}


async def everything(http: str, grpc: str, file: bytes, pixels: np.ndarray) -> dict[str, Any]:
    url = f"http://127.0.0.1:{http}"
    return {"http": await over_http(url, file, pixels), "grpc": await over_grpc(grpc, file, pixels)}


def main(http: str, grpc: str, picture: str) -> None:
    pixels = np.asarray(Image.open(picture).convert("RGB"))[None]
    print(json.dumps(asyncio.run(everything(http, grpc, Path(picture).read_bytes(), pixels))))


if __name__ == "__main__":
    main(*sys.argv[1:])
