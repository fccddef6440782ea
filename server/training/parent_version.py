"""The stored version that a job condenses: its parameters, in the order of the job's labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prompts_store import Bundle, CorruptBundle, Preprocess, Store, TaskNotFound, VersionNotFound
from server.engine.spec import Spec
from server.errors import Internal, NotFound, Unprocessable
from server.methods.registry import Registry

from .fit import FitResult
from .recipe import Recipe

OF_CLASSES = ("head.weight", "head.bias")  # the parameters whose first axis is the classes


@dataclass(frozen=True)
class Parent:
    """`preprocess`: the version's own preprocessing, which may differ from the backbone's."""

    version: str
    preprocess: Preprocess
    fitted: FitResult


class Parents:
    """Loads parents from `store` and checks that this backbone can use them."""

    def __init__(self, store: Store, registry: Registry, spec: Spec) -> None:
        self._store, self._registry, self._spec = store, registry, spec

    def get(self, task: str, recipe: Recipe, labels: tuple[str, ...]) -> Parent | None:
        """The version that `recipe` condenses; None where the job's own fit is condensed, or none.

        Raises ServiceError: version_not_found, corrupt_bundle, wrong_backbone, bad_bundle, and invalid_request for a
        version of other labels.
        """
        if recipe.condense is None or recipe.condense.version is None:
            return None
        bundle = self._bundle(task, recipe.condense.version)
        self._registry.check(bundle, self._spec)
        manifest = bundle.manifest
        method = self._registry.get(manifest.method)
        params = _in_order(bundle, labels)
        fitted = FitResult(method, recipe, params, manifest.prompt_lengths, manifest.metrics)
        return Parent(bundle.version, manifest.preprocess, fitted)

    def _bundle(self, task: str, version: str) -> Bundle:
        try:
            return self._store.get(task, version)
        except (TaskNotFound, VersionNotFound) as error:
            raise NotFound(error.detail, code="version_not_found") from error
        except CorruptBundle as error:
            raise Internal(error.detail, code=error.code) from error


def require_labels(bundle: Bundle, labels: tuple[str, ...]) -> None:
    """Raises Unprocessable (invalid_request) where the version's labels are not those of a dataset."""
    known = set(bundle.manifest.labels)
    if known != set(labels):
        difference = sorted(known ^ set(labels))
        raise Unprocessable(
            f"dataset: expected the {len(known)} labels of version {bundle.version[:12]}, got {len(labels)}; "
            f"they differ in {difference[:5]}"
        )


def _in_order(bundle: Bundle, labels: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Parameters in float32, the head's rows in the order of `labels`."""
    require_labels(bundle, labels)
    place = {label: row for row, label in enumerate(bundle.manifest.labels)}
    rows = np.array([place[label] for label in labels])
    wide = {name: np.asarray(array, np.float32) for name, array in bundle.tensors.items()}
    return {name: array[rows] if name in OF_CLASSES else array for name, array in wide.items()}
