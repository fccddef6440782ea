"""What `bench http` is held against: two servers that a user might write in an afternoon, for the same tasks.

LitServe, in `litserve_peer.py`: batches, sorted by task. `fastapi`: a plain FastAPI app, a forward for each request, in
a thread, no batches. Both have our decoding and the very bundles of the store, and the forward is the
official one: prompts inserted as tokens, `server.engine.reference`. They are run by the benchmark, by a Python that has
what they need: `python -m server.bench.peers fastapi --store URL …`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prompts_store import Bundle, open_store
from server.engine import backbone as engine_backbone
from server.engine import images, reference
from server.engine.images import Geometry

MAX_PIXELS = 100_000_000
TOP = 5


class Model:
    """The backbone and every task of a store, ready to answer one task at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self._eye = engine_backbone.load(
            options.backbone, options.weights, device="cpu", dtype=options.dtype, packed=False
        )
        store = open_store(options.store)
        self._bundles = {task: _live(store, task) for task in store.tasks()}
        store.close()
        self._params = {
            task: {name: torch.tensor(value, dtype=self._eye.dtype) for name, value in bundle.tensors.items()}
            for task, bundle in self._bundles.items()
        }
        how = self._eye.spec.preprocess
        self._geometry = Geometry.of(how.size, how.interpolation, how.crop_pct, how.crop_mode, how.mean)
        self._mean, self._std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (how.mean, how.std))

    @property
    def tasks(self) -> list[str]:
        return [*self._bundles]

    @property
    def image_size(self) -> int:
        return self._eye.spec.image_size

    @property
    def dtype(self) -> torch.dtype:
        return self._eye.dtype

    def own(self) -> Model:
        """The same with a copy of the weights."""
        twin = copy.copy(self)
        twin._eye = copy.copy(self._eye)
        twin._eye.model = copy.deepcopy(self._eye.model)
        return twin

    def decode(self, data: bytes) -> Tensor:
        """[3, S, S], normalised."""
        cut = torch.from_numpy(images.pixels(data, self._geometry, max_pixels=MAX_PIXELS))
        return ((cut.permute(2, 0, 1).float() / 255 - self._mean) / self._std).to(self._eye.dtype)

    @torch.inference_mode()
    def answer(self, task: str, pictures: Sequence[Tensor]) -> list[list[dict[str, Any]]]:
        bundle = self._bundles[task]
        lengths = bundle.manifest.prompt_lengths
        logits = reference.vpt_deep(self._eye, torch.stack(list(pictures)), self._params[task], lengths)
        return [_best(row, bundle.manifest.labels) for row in logits.double().softmax(-1).numpy()]


def _live(store: Any, task: str) -> Bundle:
    return store.get(task, store.aliases(task)["live"].targets[0].version)  # type: ignore[no-any-return]


def _best(scores: np.ndarray[Any, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    order = np.argsort(-scores)[:TOP]
    return [{"label": labels[index], "index": int(index), "score": float(scores[index])} for index in order]


def by_task(batch: Sequence[tuple[str, Tensor]], model: Model) -> list[list[dict[str, Any]]]:
    """Answers in the order of the batch, by a forward for each task in it."""
    places: dict[str, list[int]] = {}
    for place, (task, _) in enumerate(batch):
        places.setdefault(task, []).append(place)
    answers: list[list[dict[str, Any]]] = [[] for _ in batch]
    for task, own in places.items():
        for place, answer in zip(own, model.answer(task, [batch[place][1] for place in own]), strict=True):
            answers[place] = answer
    return answers


def fastapi(options: argparse.Namespace) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool

    app, model, one_at_a_time = FastAPI(), Model(options), threading.Lock()

    def answered(task: str, body: bytes) -> dict[str, Any]:
        picture = model.decode(body)
        with one_at_a_time:  # two forwards at once on one thread's worth of cores only take longer, both
            return {"predictions": model.answer(task, [picture])}

    async def predict(task: str, request: Request) -> dict[str, Any]:
        return await run_in_threadpool(answered, task, await request.body())

    predict.__annotations__["request"] = Request
    app.post("/predict/{task}")(predict)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


def copies(options: argparse.Namespace) -> None:
    """What a model of its own for every task takes: MiB with one copy, and with as many as there are tasks."""
    from server.bench.process_tree import memory_mib

    model = Model(options)
    picture = torch.zeros(3, model.image_size, model.image_size, dtype=model.dtype)
    kept, told = [], []
    for task in model.tasks:
        kept.append(model.own())
        kept[-1].answer(task, [picture])
        told.append(memory_mib(os.getpid()))
    print(json.dumps({"copies": len(kept), "first_mib": told[0], "all_mib": told[-1]}), flush=True)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.peers")
    parser.add_argument("kind", choices=("litserve", "fastapi", "copies"))
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--store", required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--wait", type=float, default=0.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    asked = options()
    {"fastapi": fastapi, "copies": copies}[asked.kind](asked)
