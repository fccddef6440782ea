"""Converts another tool's checkpoint into a bundle.

    files ──► arrays by name ──► format ──► method, parameters ──► the backbone's own check ──► bundle

A checkpoint does not name the backbone it was fitted on. Where it contains the frozen weights, they are compared with
the running backbone's; otherwise the user has to know that they are the same. The manifest's recipe records
`imported_from`, the files' digest, and `backbone: verified` or `assumed`.
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

from . import cvpt, peft, spt, timm_head, transformers_head, vpt
from .checkpoint import Checkpoint
from .format import BackboneShape, Format, ReadParameters
from .refusal import quoted, refusal

AUTO: Final = "auto"
_FORMATS: Final = (vpt.FORMAT, spt.FORMAT, cvpt.FORMAT, peft.FORMAT, timm_head.FORMAT, transformers_head.FORMAT)
FORMATS: Final = {format_.name: format_ for format_ in _FORMATS}
PREPROCESS_FIELDS: Final = ("mean", "std", "interpolation", "crop_pct", "crop_mode")

File = tuple[str, BinaryIO]
Fingerprint = Callable[[Mapping[str, NDArray[np.float32]]], str]


@dataclass(frozen=True)
class RunningBackbone:
    """The running backbone. `fingerprint_of` returns the fingerprint of a backbone of the same architecture with the
    given weights."""

    arch: str
    fingerprint: str
    shape: BackboneShape
    preprocess: Preprocess
    fingerprint_of: Fingerprint


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint does not contain. Without `labels` the classes are called 0, 1, …; `preprocess` (any of mean,
    std, interpolation, crop_pct, crop_mode) overrides the preprocessing of the format's scripts."""

    task: str
    format: str = AUTO
    labels: Sequence[str] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)


class Importer:
    """Makes bundles for the running backbone. `check` raises for a bundle that it cannot serve."""

    def __init__(self, backbone: RunningBackbone, check: Callable[[Bundle], None]) -> None:
        self._backbone, self._check = backbone, check

    def bundle(self, files: Sequence[File], options: ImportOptions, store: Store) -> Bundle:
        """A bundle of the checkpoint in `files`, not stored yet. Importing the same again makes the same version.

        Raises Unprocessable (bad_checkpoint, no_head, unknown_format), Conflict (wrong_backbone).
        """
        checkpoint = Checkpoint.read(files)
        format_ = _format(checkpoint, options.format)
        task_params = format_.read(checkpoint, self._backbone.shape)
        manifest = self._manifest(
            task_params,
            options,
            {
                "imported_from": format_.name,
                "imported_sha256": checkpoint.sha256,
                "backbone": self._check_backbone(task_params),
            },
        )
        try:
            bundle = Bundle.build(_with_earlier_date(manifest, store), task_params.params)
        except BundleError as error:
            raise refusal(error.detail) from error
        self._check(bundle)
        return bundle

    def _check_backbone(self, task_params: ReadParameters) -> str:
        """`verified` if the checkpoint contains the running backbone, `assumed` if it lacks parts of a backbone.

        Raises Conflict wrong_backbone for another backbone.
        """
        if set(task_params.backbone) != set(self._backbone.shape.names):
            return "assumed"
        theirs = self._backbone.fingerprint_of({name: read() for name, read in task_params.backbone.items()})
        if theirs != self._backbone.fingerprint:
            raise Conflict(
                f"the checkpoint contains another backbone ({theirs}) than this server runs: {self._backbone.arch} "
                f"({self._backbone.fingerprint}). A model whose backbone was trained too cannot be imported",
                code="wrong_backbone",
            )
        return "verified"

    def _manifest(self, task_params: ReadParameters, options: ImportOptions, recipe: dict[str, Any]) -> Manifest:
        return Manifest(
            task=options.task,
            method=task_params.method,
            backbone=Backbone(self._backbone.arch, self._backbone.fingerprint),
            labels=_labels(options.labels, len(task_params.params["head.weight"])),
            prompt_lengths=task_params.prompt_lengths,
            preprocess=_preprocess(self._backbone.preprocess, task_params, options),
            metrics={},
            recipe=recipe,
            dataset=None,
            parent=None,
            created_at=round(time.time(), 3),
            lensrack_version=__version__,
        )


def _format(checkpoint: Checkpoint, name: str) -> Format:
    if name == AUTO:
        match = next((f for f in FORMATS.values() if f.recognises(checkpoint)), None)
        if match is None:
            known = "; ".join(f"{f.name}: {f.meaning}" for f in FORMATS.values())
            raise refusal(f"expected one of these formats: {known}; got {checkpoint.summary}")
        return match
    if name not in FORMATS:
        raise refusal(f"expected a format of {', '.join((AUTO, *FORMATS))}, got {quoted(name)}", code="unknown_format")
    return FORMATS[name]


def _labels(labels: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    if labels is None:
        return tuple(map(str, range(classes)))
    if len(labels) != classes:
        raise refusal(f"labels: expected {classes}, one for each class of the head, got {len(labels)}")
    return tuple(labels)


def _preprocess(backbone: Preprocess, task_params: ReadParameters, options: ImportOptions) -> Preprocess:
    """The backbone's preprocessing, overridden by the format's and then by the caller's."""
    if unknown := sorted(set(options.preprocess) - set(PREPROCESS_FIELDS)):
        raise refusal(f"preprocess: expected {', '.join(PREPROCESS_FIELDS)}, got {quoted(unknown[0])}")
    return replace(backbone, **{**task_params.preprocess, **options.preprocess})


def _with_earlier_date(manifest: Manifest, store: Store) -> Manifest:
    """The manifest with the date of an earlier import of the same content, so that it makes the same version."""
    try:
        infos = store.versions(manifest.task)
    except TaskNotFound:
        return manifest
    dateless = asdict(Manifest.from_json(replace(manifest, created_at=0.0).to_json()))
    dates = (info.manifest.created_at for info in infos if asdict(replace(info.manifest, created_at=0.0)) == dateless)
    return replace(manifest, created_at=next(dates, manifest.created_at))
