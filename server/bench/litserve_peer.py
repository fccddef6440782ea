"""A LitServe app for many tasks, as good as such an app gets here: batches as they arrive, sorted by task, a forward
for each task in a batch, no gradients, the fast queue, one worker. With `--own-models` it holds a whole model for each
task instead of one backbone and prompts.

Run by a Python that has LitServe: `python -m server.bench.litserve_peer litserve --store URL …`.
"""

from __future__ import annotations

import argparse
import base64
from typing import Any

import litserve

from .peers import by_task, loaded, options


class Grouped(litserve.LitAPI):  # type: ignore[misc]
    """A request is a task's name and a picture in base64, which is cheaper to parse than a form."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        super().__init__(max_batch_size=parsed.batch, batch_timeout=parsed.wait)
        self._options = parsed

    def setup(self, device: str) -> None:
        self._model = loaded(self._options)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation as a schema
        return request["task"], self._model.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: Any) -> Any:
        if isinstance(batch, tuple):  # without batching LitServe passes a single request without a list
            return by_task([batch], self._model)[0]
        return by_task(batch, self._model)

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {"predictions": [output]}


if __name__ == "__main__":
    parsed = options()
    server = litserve.LitServer(Grouped(parsed), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=parsed.port, num_api_servers=1, generate_client_file=False, log_level="warning")
