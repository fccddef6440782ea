"""From a stranger's checkpoint to a bundle of ours.

    files ──► arrays by name ──► format ──► method, parameters ──► the backbone's own check ──► bundle

A checkpoint does not say which backbone it was fitted on. Where it holds the frozen weights they are compared with the
running backbone's; otherwise that they are the same is the word of whoever imports it. The manifest tells which: its
recipe says `imported_from`, the files' digest, and `backbone: verified` or `assumed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from prompts_store import Backbone, Bundle, BundleError, Manifest, Preprocess, Store, TaskNotFound
from server import __version__
from server.errors import Conflict

from . import cvpt, peft, spt, timm_head, vpt
from .checkpoint import Checkpoint
from .format import Format, ReadParameters, Width
from .refusal import refused, shown

AUTO: Final = "auto"
FORMATS: Final = {own.name: own for own in (vpt.FORMAT, spt.FORMAT, cvpt.FORMAT, peft.FORMAT, timm_head.FORMAT)}
PREPROCESS_FIELDS: Final = ("mean", "std", "interpolation", "crop_pct", "crop_mode")

File = tuple[str, BinaryIO]
Fingerprint = Callable[[Mapping[str, NDArray[np.float32]]], str]


@dataclass(frozen=True)
class RunningBackbone:
    """The running backbone. `names`: its parameters' shapes; `fingerprint_of` tells the fingerprint that a backbone of
    the same architecture with these weights would have."""

    arch: str
    fingerprint: str
    width: Width
    preprocess: Preprocess
    fingerprint_of: Fingerprint


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint does not say. Without `labels` classes are called 0, 1, …; `preprocess` holds any of mean, std,
    interpolation, crop_pct, crop_mode, in the place of what the format's own scripts do."""

    task: str
    format: str = AUTO
    labels: Sequence[str] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)


class Importer:
    """`check` refuses a bundle that the running backbone cannot serve."""

    def __init__(self, backbone: RunningBackbone, check: Callable[[Bundle], None]) -> None:
        self._backbone, self._check = backbone, check

    def bundle(self, files: Sequence[File], wanted: ImportOptions, store: Store) -> Bundle:
        """A bundle of the checkpoint in `files`, not stored yet. What was imported before becomes the same version.

        Raises Unprocessable (bad_checkpoint, no_head, unknown_format), Conflict (wrong_backbone).
        """
        checkpoint = Checkpoint.read(files)
        form = _format(checkpoint, wanted.format)
        found = form.read(checkpoint, self._backbone.width)
        manifest = self._manifest(
            found,
            wanted,
            {
                "imported_from": form.name,
                "imported_sha256": checkpoint.sha256,
                "backbone": self._compared(found),
            },
        )
        try:
            bundle = Bundle.build(_as_before(manifest, store), found.params)
        except BundleError as error:
            raise refused(error.detail) from error
        self._check(bundle)
        return bundle

    def _compared(self, found: ReadParameters) -> str:
        """`verified` where the checkpoint holds the running backbone, `assumed` where it does not hold all of one."""
        if set(found.backbone) != set(self._backbone.width.names):
            return "assumed"
        theirs = self._backbone.fingerprint_of({name: read() for name, read in found.backbone.items()})
        if theirs != self._backbone.fingerprint:
            raise Conflict(
                f"the checkpoint holds another backbone ({theirs}) than this server runs: {self._backbone.arch} "
                f"({self._backbone.fingerprint}). A model whose backbone was trained too cannot share one with others",
                code="wrong_backbone",
            )
        return "verified"

    def _manifest(self, found: ReadParameters, wanted: ImportOptions, recipe: dict[str, Any]) -> Manifest:
        return Manifest(
            task=wanted.task,
            method=found.method,
            backbone=Backbone(self._backbone.arch, self._backbone.fingerprint),
            labels=_labels(wanted.labels, len(found.params["head.weight"])),
            prompt_lengths=found.prompt_lengths,
            preprocess=_preprocess(self._backbone.preprocess, found, wanted),
            metrics={},
            recipe=recipe,
            dataset=None,
            parent=None,
            created_at=round(time.time(), 3),
            lensrack_version=__version__,
        )


def _format(checkpoint: Checkpoint, name: str) -> Format:
    if name == AUTO:
        found = next((own for own in FORMATS.values() if own.recognises(checkpoint)), None)
        if found is None:
            known = "; ".join(f"{own.name}: {own.meaning}" for own in FORMATS.values())
            raise refused(f"expected one of these formats: {known}; got {checkpoint.told}")
        return found
    if name not in FORMATS:
        raise refused(f"expected a format of {', '.join((AUTO, *FORMATS))}, got {shown(name)}", code="unknown_format")
    return FORMATS[name]


def _labels(given: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    if given is None:
        return tuple(map(str, range(classes)))
    if len(given) != classes:
        raise refused(f"labels: expected {classes}, one for each class of the head, got {len(given)}")
    return tuple(given)


def _preprocess(own: Preprocess, found: ReadParameters, wanted: ImportOptions) -> Preprocess:
    """The backbone's, then what the format's scripts do, then what is wanted."""
    if unknown := sorted(set(wanted.preprocess) - set(PREPROCESS_FIELDS)):
        raise refused(f"preprocess: expected {', '.join(PREPROCESS_FIELDS)}, got {shown(unknown[0])}")
    return replace(own, **{**found.preprocess, **wanted.preprocess})


def _as_before(manifest: Manifest, store: Store) -> Manifest:
    """With the date of an earlier import of the same, if there is one: the same content makes the same version."""
    try:
        infos = store.versions(manifest.task)
    except TaskNotFound:
        return manifest
    wanted = asdict(Manifest.from_json(replace(manifest, created_at=0.0).to_json()))
    dates = (info.manifest.created_at for info in infos if asdict(replace(info.manifest, created_at=0.0)) == wanted)
    return replace(manifest, created_at=next(dates, manifest.created_at))
