"""Synthetic tasks that need no fit: times do not depend on a bundle's values, and benchmarks need thousands of
tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from prompts_store import Backbone as Fingerprint
from prompts_store import Bundle, Manifest, Store
from server import __version__
from server.engine import backbone as engine_backbone
from server.engine.spec import Spec
from server.methods.registry import Registry
from server.settings import Settings

LIVE = "live"
CLASSES = 10


def names(count: int) -> tuple[str, ...]:
    return tuple(f"task-{number:05d}" for number in range(count))


def spec_of(settings: Settings) -> Spec:
    """The spec of the backbone that a server with these settings runs. Loads the backbone and discards it."""
    return engine_backbone.load(settings.backbone, settings.backbone_weights, device="cpu", packed=False).spec


def bundle(spec: Spec, task: str, method: str, prompts: int, seed: int) -> Bundle:
    """Initial parameters of a fit, with a random head."""
    drawn, chance = Registry().get(method), torch.Generator().manual_seed(seed)
    lengths = drawn.prompt_lengths(spec, prompts)
    params = drawn.init(spec, lengths, CLASSES, chance)
    params["head.weight"] = torch.randn(params["head.weight"].shape, generator=chance)
    manifest = Manifest(
        task=task,
        method=method,
        backbone=Fingerprint(arch=spec.arch, fingerprint=spec.fingerprint),
        labels=tuple(f"class {number}" for number in range(CLASSES)),
        prompt_lengths=lengths,
        preprocess=spec.preprocess,
        metrics={},
        recipe={},
        dataset=None,
        parent=None,
        created_at=float(seed),
        lensrack_version=__version__,
    )
    return Bundle.build(manifest, {name: value.numpy() for name, value in params.items()})


def publish(store: Store, spec: Spec, tasks: Sequence[str], method: str, prompts: int) -> Iterator[str]:
    """Publish each task's one version as live. Lazy: thousands take a while, and callers show progress."""
    for seed, task in enumerate(tasks):
        version = store.put(bundle(spec, task, method, prompts, seed))
        store.set_alias(task, LIVE, version)
        yield version


def pictures(source: Path | None, folder: Path, count: int, side: int = 256) -> list[Path]:
    """`count` JPEGs in `folder`: of the pictures in `source`, in order of name, or drawn ones if it is None.

    They are encoded anew, upright and `side` pixels at the shorter side, so that every server gets the same bytes.
    """
    from PIL import Image, ImageOps

    from server.cli.sample_pictures import draw

    if source is None:
        source = folder / "drawn"
        draw(source)
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise SystemExit(f"expected pictures in {source}, found none")
    written = []
    for number in range(count):
        with Image.open(files[number * len(files) // count % len(files)]) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        scale = side / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        written.append(folder / f"picture-{number:03d}.jpg")
        picture.save(written[-1], "JPEG", quality=90)
    return written
