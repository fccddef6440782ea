"""Methods by name, and a stored bundle's way to a lens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from prompts_store import Bundle
from server.engine.backbone import Backbone, Spec
from server.engine.images import Geometry
from server.engine.lens import Lens
from server.engine.residency import Loaded
from server.errors import BadRequest, Conflict, Unprocessable

from .adapter import Adapter
from .bias import Bias
from .cvpt import Cvpt
from .linear import Linear
from .lora import Lora
from .memory import Memory
from .method import Method, Params
from .mlp import Mlp
from .prompt_bias import PromptBias
from .vpt_deep import VptDeep
from .vpt_shallow import VptShallow

METHODS: Final[tuple[Method, ...]] = (
    VptDeep(),
    VptShallow(),
    Linear(),
    Mlp(),
    Bias(),
    PromptBias(),
    Cvpt(),
    Lora(),
    Adapter(),
    Memory(),
)
# More of them would leave a search's budget too few trials of each; docs/results/accuracy.md tells what these reach.
SEARCHED: Final = ("linear", "vpt_shallow", "vpt_deep")


class Registry:
    """The methods this process knows. `register` adds one from outside."""

    def __init__(self, methods: tuple[Method, ...] = METHODS) -> None:
        self._methods = {method.name: method for method in methods}

    def register(self, method: Method) -> None:
        self._methods[method.name] = method

    def get(self, name: str) -> Method:
        """Raises Unprocessable (unknown_method) naming what there is."""
        if name not in self._methods:
            raise Unprocessable(
                f"unknown method {name!r}: expected one of {sorted(self._methods)}", code="unknown_method"
            )
        return self._methods[name]

    @property
    def all(self) -> tuple[Method, ...]:
        return tuple(self._methods.values())

    @property
    def searched(self) -> tuple[Method, ...]:
        """What a search chooses among where no method is named."""
        return tuple(self._methods[name] for name in SEARCHED if name in self._methods)

    @property
    def meanings(self) -> Mapping[str, str]:
        return {name: method.meaning for name, method in self._methods.items()}

    def check(self, bundle: Bundle, spec: Spec) -> None:
        """Refuse a bundle that this backbone and its own method cannot serve: wrong_backbone, bad_bundle."""
        manifest = bundle.manifest
        if manifest.backbone.fingerprint != spec.fingerprint:
            raise Conflict(
                f"the bundle was fitted on backbone {manifest.backbone.arch} ({manifest.backbone.fingerprint}); "
                f"this server runs {spec.arch} ({spec.fingerprint})",
                code="wrong_backbone",
            )
        if manifest.method not in self._methods:
            raise BadRequest(
                f"the bundle's method is {manifest.method!r}: expected one of {sorted(self._methods)}",
                code="bad_bundle",
            )
        if len(manifest.prompt_lengths) != spec.depth:
            raise BadRequest(
                f"the bundle gives prompt lengths for {len(manifest.prompt_lengths)} layers, "
                f"the backbone has {spec.depth}",
                code="bad_bundle",
            )
        if manifest.preprocess.size != spec.image_size:
            raise BadRequest(
                f"the bundle asks for {manifest.preprocess.size} px images, the backbone takes {spec.image_size} px",
                code="bad_bundle",
            )
        self._check_shapes(bundle, spec)

    def _check_shapes(self, bundle: Bundle, spec: Spec) -> None:
        manifest = bundle.manifest
        method, lengths = self._methods[manifest.method], manifest.prompt_lengths
        possible = method.prompt_lengths(spec, 1)
        if any(length and not some for length, some in zip(lengths, possible, strict=True)):
            where = [layer for layer, some in enumerate(possible) if some]
            raise BadRequest(
                f"method {method.name} has {f'prompts in layers {where} only' if where else 'no prompts'}, "
                f"the bundle gives lengths {list(lengths)}",
                code="bad_bundle",
            )
        expected = method.shapes(spec, lengths, len(manifest.labels))
        found = {name: tuple(array.shape) for name, array in bundle.tensors.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise BadRequest(
                f"the bundle's parameters do not fit method {manifest.method}: "
                + "; ".join(f"{name} is {found.get(name)}, expected {expected.get(name)}" for name in wrong[:4]),
                code="bad_bundle",
            )

    def lower(self, bundle: Bundle, backbone: Backbone) -> Lens:
        """A stored bundle to a lens in the backbone's dtype, on its device."""
        params: Params = {
            name: torch.tensor(array, device=backbone.device, dtype=backbone.dtype)
            for name, array in bundle.tensors.items()
        }
        method = self._methods[bundle.manifest.method]
        with torch.inference_mode():
            return method.lower(backbone, params, bundle.manifest.prompt_lengths)

    def load(self, bundle: Bundle, backbone: Backbone) -> Loaded:
        """Check and lower: what the rack's loader does with what comes from the store."""
        self.check(bundle, backbone.spec)
        manifest = bundle.manifest
        how = manifest.preprocess
        return Loaded(
            lens=self.lower(bundle, backbone),
            labels=manifest.labels,
            geometry=Geometry.of(how.size, how.interpolation, how.crop_pct, how.crop_mode, how.mean),
            mean=how.mean,
            std=how.std,
        )
