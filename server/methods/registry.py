"""Methods by name, and a stored bundle's path to a lens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Final

import torch

from prompts_store import Bundle
from server.engine.backbone import Backbone
from server.engine.images.decode import Geometry
from server.engine.lens import Lens
from server.engine.residency import Loaded
from server.engine.spec import Spec
from server.errors import BadRequest, Conflict, Unprocessable

from . import pooling
from .adapter import Adapter
from .baseline import Baseline
from .bias import Bias
from .cvpt import Cvpt
from .full import Full
from .linear import Linear
from .lora import Lora
from .memory import Memory
from .method import Method, Params
from .mlp import Mlp
from .partial import Partial
from .prompt_bias import PromptBias
from .readonly import Readonly
from .side import Side
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
    Readonly(),
)
BASELINES: Final[tuple[Baseline, ...]] = (Full(), Partial(1), Partial(2), Partial(4), Side())
# With more methods a search's budget would allow too few trials of each; docs/results/accuracy.md has their accuracy.
SEARCHED: Final = ("linear", "vpt_shallow", "vpt_deep")


COMPARE: Final = "compare"  # the method name of a job that compares methods
ENTRY_POINT: Final = "lensrack.methods"
NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_WORDS: Final = ("auto", COMPARE)  # values of a job's method that are no method's name
_METHOD_HAS: Final = ("name", "meaning", "defaults", "candidates", "prompt_lengths", "shapes", "init", "lower")


def not_servable(name: str, why: str) -> Unprocessable:
    """The error for serving or publishing a baseline."""
    return Unprocessable(
        f"method {name!r} {why}: it can be fitted and reported (publish 'never', or a comparison), not served",
        code="method_not_servable",
    )


class Registry:
    """The methods of this process, and the baselines that they are compared with. `register` adds a method from
    outside."""

    def __init__(self, methods: tuple[Method, ...] = METHODS, baselines: tuple[Baseline, ...] = BASELINES) -> None:
        self._methods = {method.name: method for method in methods}
        self._baselines = {baseline.name: baseline for baseline in baselines}

    @classmethod
    def installed(cls) -> Registry:
        """A registry with the methods of every installed package that names one under the entry point
        `lensrack.methods`.

        Raises ValueError for an object that is no method, or whose name is taken.
        """
        registry = cls()
        for point in sorted(entry_points(group=ENTRY_POINT), key=lambda entry_point: entry_point.name):
            try:
                loaded = point.load()
                method = loaded() if isinstance(loaded, type) else loaded
            except Exception as error:  # third-party code may raise anything
                raise ValueError(f"the method {point.name!r} ({point.value}) cannot be loaded: {error}") from error
            registry.register(method)
        return registry

    def register(self, method: Method) -> None:
        """Add a method. Raises ValueError for an object that is no method, and for a name that is malformed or
        taken."""
        if missing := [name for name in _METHOD_HAS if not hasattr(method, name)]:
            raise ValueError(f"{method!r} is no method: it has no {', '.join(missing)}")
        if not NAME.fullmatch(method.name):
            raise ValueError(f"a method's name looks like {NAME.pattern}, not {method.name!r}")
        if method.name in {*self._methods, *self._baselines, *_WORDS}:
            raise ValueError(f"there is a method {method.name!r} already")
        self._methods[method.name] = method

    def get(self, name: str) -> Method:
        """Return the method. Raises Unprocessable: unknown_method, listing the known ones; method_not_servable for a
        baseline."""
        if name in self._baselines:
            raise not_servable(name, self._baselines[name].why)
        if name not in self._methods:
            near = get_close_matches(name, self._methods, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Unprocessable(
                f"unknown method {name!r}: expected one of {sorted(self._methods)}{hint}", code="unknown_method"
            )
        return self._methods[name]

    def baseline(self, name: str) -> Baseline | None:
        """The baseline of that name, or None."""
        return self._baselines.get(name)

    def fittable(self, name: str) -> Method | Baseline:
        """A method or a baseline. Raises Unprocessable (unknown_method), listing the methods."""
        return self._baselines.get(name) or self.get(name)

    @property
    def all(self) -> tuple[Method, ...]:
        return tuple(self._methods.values())

    @property
    def searched(self) -> tuple[Method, ...]:
        """The methods of a search that names none."""
        return tuple(self._methods[name] for name in SEARCHED if name in self._methods)

    @property
    def meanings(self) -> Mapping[str, str]:
        return {name: method.meaning for name, method in self._methods.items()}

    @property
    def baselines(self) -> Mapping[str, Baseline]:
        return dict(self._baselines)

    def check(self, bundle: Bundle, spec: Spec) -> None:
        """Raise if this backbone or the bundle's method cannot serve the bundle: wrong_backbone, bad_bundle."""
        manifest = bundle.manifest
        if manifest.backbone.fingerprint != spec.fingerprint:
            raise Conflict(
                f"the bundle was fitted on backbone {manifest.backbone.arch} ({manifest.backbone.fingerprint}); "
                f"this server runs {spec.arch} ({spec.fingerprint})",
                code="wrong_backbone",
            )
        if manifest.method in self._baselines:
            raise not_servable(manifest.method, self._baselines[manifest.method].why)
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
        if (reason := pooling.unsupported_pool(spec, manifest.pool)) is not None:
            raise BadRequest(f"the bundle's {reason}", code="bad_bundle")
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
        shapes = {name: tuple(array.shape) for name, array in bundle.tensors.items()}
        if shapes != expected:
            wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
            raise BadRequest(
                f"the bundle's parameters do not fit method {manifest.method}: "
                + "; ".join(f"{name} is {shapes.get(name)}, expected {expected.get(name)}" for name in wrong[:4]),
                code="bad_bundle",
            )

    def lower(self, bundle: Bundle, backbone: Backbone) -> Lens:
        """Lower a stored bundle to a lens in the backbone's dtype, on its device."""
        params: Params = {
            name: torch.tensor(array, device=backbone.device, dtype=backbone.dtype)
            for name, array in bundle.tensors.items()
        }
        method = self._methods[bundle.manifest.method]
        with torch.inference_mode():
            return pooling.lower_with_pool(
                method, backbone, params, bundle.manifest.prompt_lengths, bundle.manifest.pool
            )

    def load(self, bundle: Bundle, backbone: Backbone) -> Loaded:
        """Check and lower a bundle from the store, for the rack's loader."""
        self.check(bundle, backbone.spec)
        manifest = bundle.manifest
        preprocess = manifest.preprocess
        return Loaded(
            lens=self.lower(bundle, backbone),
            labels=manifest.labels,
            geometry=Geometry.of(
                preprocess.size, preprocess.interpolation, preprocess.crop_pct, preprocess.crop_mode, preprocess.mean
            ),
            mean=preprocess.mean,
            std=preprocess.std,
        )
