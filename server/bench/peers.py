"""The peers of `bench http`: servers that a user might write in an afternoon, for the same tasks.

LitServe, in `litserve_peer.py`: batches, sorted by task. `fastapi`: a plain FastAPI app, a forward for each request, in
a thread, no batches. Both use our decoding and the same bundles of the store, and the forward is the official one:
prompts inserted as tokens, `server.engine.reference`. With `--own-models` either is what users run who fine-tuned a
whole model for each task: as many models, each with a task's head, plain forwards. The benchmark runs them with a
Python that has their packages: `python -m server.bench.peers fastapi --store URL …`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompts_store import Bundle, Manifest, open_store
from server.engine import backbone as engine_backbone
from server.engine import reference
from server.engine.images import decode
from server.engine.images.decode import Geometry

MAX_PIXELS = 100_000_000
TOP = 5
TUNED = 0.01  # relative change of a weight by the simulated fine-tuning


class Model:
    """The backbone and the tasks of a store, ready to answer one task at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self._backbone = engine_backbone.load(
            options.backbone, options.weights, device="cpu", dtype=options.dtype, packed=False
        )
        bundles = _live_ones(options.store, options.tasks)
        self._manifests: dict[str, Manifest] = {task: bundle.manifest for task, bundle in bundles.items()}
        self._params = {task: self._kept(bundle) for task, bundle in bundles.items()}
        preprocess = self._backbone.spec.preprocess
        self._geometry = Geometry.of(
            preprocess.size, preprocess.interpolation, preprocess.crop_pct, preprocess.crop_mode, preprocess.mean
        )
        self._mean, self._std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (preprocess.mean, preprocess.std))

    @property
    def tasks(self) -> list[str]:
        return [*self._manifests]

    @property
    def image_size(self) -> int:
        return self._backbone.spec.image_size

    @property
    def dtype(self) -> torch.dtype:
        return self._backbone.dtype

    def decode(self, data: bytes) -> Tensor:
        """[3, S, S], normalised."""
        cut = torch.from_numpy(decode.pixels(data, self._geometry, max_pixels=MAX_PIXELS))
        return ((cut.permute(2, 0, 1).float() / 255 - self._mean) / self._std).to(self._backbone.dtype)

    @torch.inference_mode()
    def answer(self, task: str, pictures: Sequence[Tensor]) -> list[list[dict[str, Any]]]:
        logits = self._logits(task, torch.stack(list(pictures)))
        return [_best(row, self._manifests[task].labels) for row in logits.double().softmax(-1).numpy()]

    def _kept(self, bundle: Bundle) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=self._backbone.dtype) for name, value in bundle.tensors.items()}

    def _logits(self, task: str, pixels: Tensor) -> Tensor:
        return reference.vpt_deep(self._backbone, pixels, self._params[task], self._manifests[task].prompt_lengths)


class ModelPerTask(Model):
    """A whole ViT for every task, as if each had been fine-tuned, with that task's head. No prompts.

    No two models share memory, and because every weight has been changed, the system cannot share pages either. There
    are as many models as tasks: the last task uses the one that was loaded.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        first, last = self._backbone.model, self.tasks[-1]
        self.models = {task: first if task == last else copy.deepcopy(first) for task in self.tasks}
        for seed, model in enumerate(self.models.values()):
            _fine_tune(model, seed)

    def _kept(self, bundle: Bundle) -> dict[str, Tensor]:
        return {name: value for name, value in super()._kept(bundle).items() if name.startswith("head.")}

    def _logits(self, task: str, pixels: Tensor) -> Tensor:
        model, params = self.models[task], self._params[task]
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
        return F.linear(features, params["head.weight"], params["head.bias"])


def loaded(options: argparse.Namespace) -> Model:
    return ModelPerTask(options) if options.own_models else Model(options)


def _live_ones(url: str, most: int) -> Mapping[str, Bundle]:
    store = open_store(url)
    tasks = list(store.tasks())[: most or None]
    bundles = {task: store.get(task, store.aliases(task)["live"].targets[0].version) for task in tasks}
    store.close()
    return bundles


def _fine_tune(model: nn.Module, seed: int) -> None:
    """Change every parameter by a random factor: like a fit, this writes all of them; the values do not matter."""
    chance = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + TUNED * (torch.rand((), generator=chance) - 0.5))


def _best(scores: np.ndarray[Any, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    order = np.argsort(-scores)[:TOP]
    return [{"label": labels[index], "index": int(index), "score": float(scores[index])} for index in order]


def by_task(batch: Sequence[tuple[str, Tensor]], model: Model) -> list[list[dict[str, Any]]]:
    """Answers in the order of the batch, with one forward per task."""
    places: dict[str, list[int]] = {}
    for place, (task, _) in enumerate(batch):
        places.setdefault(task, []).append(place)
    answers: list[list[dict[str, Any]]] = [[] for _ in batch]
    for task, rows in places.items():
        for place, answer in zip(rows, model.answer(task, [batch[place][1] for place in rows]), strict=True):
            answers[place] = answer
    return answers


def fastapi(options: argparse.Namespace) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool

    app, model, one_at_a_time = FastAPI(), loaded(options), threading.Lock()

    def answered(task: str, body: bytes) -> dict[str, Any]:
        picture = model.decode(body)
        with one_at_a_time:  # two concurrent forwards on one thread's worth of cores would both take longer
            return {"predictions": model.answer(task, [picture])}

    async def predict(task: str, request: Request) -> dict[str, Any]:
        return await run_in_threadpool(answered, task, await request.body())

    predict.__annotations__["request"] = Request
    app.post("/predict/{task}")(predict)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


def copies(options: argparse.Namespace) -> None:
    """Memory of a model for each task without a server, once all have answered."""
    from .process_tree import memory

    model = ModelPerTask(options)
    picture = torch.zeros(3, model.image_size, model.image_size, dtype=model.dtype)
    for task in model.tasks:
        model.answer(task, [picture])
    print(json.dumps({"copies": len(model.tasks), **memory(os.getpid())._asdict()}), flush=True)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.peers")
    parser.add_argument("kind", choices=("litserve", "fastapi", "copies"))
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--store", required=True)
    parser.add_argument("--tasks", type=int, default=0, help="use only the first tasks of the store; 0: all")
    parser.add_argument("--own-models", action="store_true", help="a whole model for each task, no prompts")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--wait", type=float, default=0.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = options()
    {"fastapi": fastapi, "copies": copies}[parsed.kind](parsed)
