"""An ensemble over the real engine in float64: different methods of one task in one batch, averaged exactly."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from prompts_store import Backbone as Fingerprint
from prompts_store import Bundle, Manifest, open_store
from server.batching.batcher import Batcher
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.rack import Rack
from server.engine.residency import Residency
from server.methods.registry import Registry
from server.serving.answers import Limits
from server.serving.predictor import Predictor
from server.serving.resolver import Ref
from tests.engine.golden_cases import golden_backbone

pytestmark = pytest.mark.anyio
LABELS = ("a", "b", "c", "d")
MEMBERS = ("vpt_deep", "vpt_shallow", "linear", "lora")


def fitted(backbone: Backbone, method: str, seed: int) -> Bundle:
    """Parameters that nobody fitted, but that answer differently."""
    spec, chosen = backbone.spec, Registry().get(method)
    lengths, generator = chosen.prompt_lengths(spec, 3), torch.Generator().manual_seed(seed)
    params = chosen.init(spec, lengths, len(LABELS), generator)
    drawn = {name: (value + torch.randn(value.shape, generator=generator)).numpy() for name, value in params.items()}
    order = LABELS[seed % 4 :] + LABELS[: seed % 4]
    manifest = Manifest(
        task="fish", method=method, backbone=Fingerprint(arch=spec.arch, fingerprint=spec.fingerprint), labels=order,
        prompt_lengths=lengths, preprocess=spec.preprocess, metrics={}, recipe={}, dataset=None, parent=None,
        created_at=0.0, lensrack_version="0",
    )  # fmt: skip
    half = replace(manifest.preprocess, mean=(0.4, 0.5, 0.6)) if seed % 2 else manifest.preprocess
    return Bundle.build(replace(manifest, preprocess=half), drawn)


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 80, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def test_it_is_the_mean_of_the_separate_answers() -> None:
    backbone, store = golden_backbone("vit_nano", 101, torch.float64), open_store("memory://")
    for number, method in enumerate(MEMBERS):
        store.set_alias("fish", method, store.put(fitted(backbone, method, number)))
    rack = Rack(dim=backbone.spec.dim, slots=8, vectors=4000, dtype=torch.float64)
    with ThreadPoolExecutor(2) as pool:
        residency = Residency(rack, lambda task, version: Registry().load(store.get(task, version), backbone), pool)
        batcher = Batcher(Engine(backbone, rack), max_batch=64, max_queue=64)
        spec = backbone.spec
        predictor = Predictor(
            store, residency, batcher, pool, limits=Limits(16, 10**6, 20), geometry=spec.geometry,
            fingerprint=spec.fingerprint,
        )  # fmt: skip
        images = [picture(1), picture(2)]

        async def ask(ref: str) -> list[dict[str, float]]:
            answer = await predictor.predict(Ref.parse_all(ref), images, 10, key="k", tenant="", timeout_s=60)
            return [{one.label: one.score for one in of_image} for of_image in answer.predictions]

        separate = [await ask(f"fish@{method}") for method in MEMBERS]
        together = await ask("fish@" + "+".join(MEMBERS))
        await batcher.drain(5)
    for image in range(2):
        for label in LABELS:
            mean = sum(answers[image][label] for answers in separate) / len(MEMBERS)
            assert together[image][label] == pytest.approx(mean, abs=1e-9)
    assert max(abs(separate[0][0][label] - separate[1][0][label]) for label in LABELS) > 1e-3, "they do differ"
