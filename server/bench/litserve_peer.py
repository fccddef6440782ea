"""A LitServe app that answers many tasks, as good as such an app gets here: batches as they come, sorted by task, a
forward for each task in a batch, no gradients, the fast queue, one worker. With `--own-models` it holds a whole model
for each task instead of one backbone and prompts.

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

    def __init__(self, asked: argparse.Namespace) -> None:
        super().__init__(max_batch_size=asked.batch, batch_timeout=asked.wait)
        self._asked = asked

    def setup(self, device: str) -> None:
        self._model = loaded(self._asked)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation as a schema
        return request["task"], self._model.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: Any) -> Any:
        if isinstance(batch, tuple):  # LitServe hands a lone request over without its list where no batch is asked for
            return by_task([batch], self._model)[0]
        return by_task(batch, self._model)

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {"predictions": [output]}


if __name__ == "__main__":
    asked = options()
    server = litserve.LitServer(Grouped(asked), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=asked.port, num_api_servers=1, generate_client_file=False, log_level="warning")
