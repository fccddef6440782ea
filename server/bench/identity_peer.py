"""LitServe with a model that costs nothing: a number is returned as it is, for a picture ten numbers are returned.

LitServe reads JSON and forms, no raw bodies, so pixels are sent as base64 in JSON, which is cheaper to parse than a
form; they stay bytes. One worker, batches as they arrive. Run by a Python that has LitServe: `python -m
server.bench.identity_peer PORT BATCH`.
"""

import base64
import sys
from typing import Any

import litserve


class Identity(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation as a schema
        if "pixels" not in request:
            return request["input"]
        return base64.b64decode(request["pixels"])

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: Any) -> Any:
        if isinstance(batch, list):
            return [_answered(item) for item in batch]
        return _answered(batch)  # without batching LitServe passes a single request without a list

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"output": output}


def _answered(value: Any) -> Any:
    return [0.0] * 10 if isinstance(value, bytes) else value


if __name__ == "__main__":
    api = Identity(max_batch_size=int(sys.argv[2]), batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False)
