"""Methods: what a bundle must hold, lowering that training can go through, and a method from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from prompts_store import Backbone as BundleBackbone
from prompts_store import Bundle, Manifest
from server.engine.backbone import Backbone
from server.engine.lens import Lens, no_prefix
from server.engine.spec import Spec
from server.errors import ServiceError
from server.methods.method import Params, Shapes, head_init, head_shapes
from server.methods.registry import Registry
from tests.engine.golden_cases import Bench, golden_backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return golden_backbone("vit_nano", 101, torch.float32)


def bundle(served_by: Backbone, drawn_as: str, registry: Registry | None = None, **changes: object) -> Bundle:
    spec = served_by.spec
    chosen = (registry or Registry()).get(drawn_as)
    lengths = chosen.prompt_lengths(spec, 3)
    params = chosen.init(spec, lengths, 4, torch.Generator().manual_seed(0))
    manifest = Manifest(
        task="t",
        method=drawn_as,
        backbone=BundleBackbone(spec.arch, spec.fingerprint),
        labels=("a", "b", "c", "d"),
        prompt_lengths=lengths,
        preprocess=spec.preprocess,
        metrics={},
        recipe={},
        dataset=None,
        parent=None,
        created_at=1.0,
        lensrack_version="0",
    )
    tensors = {name: value.numpy() for name, value in params.items()}
    tensors |= changes.pop("tensors", {})
    return Bundle.build(replace(manifest, **changes), tensors)


@pytest.mark.parametrize("method", Registry().meanings)
def test_what_init_draws_is_what_shapes_promise(backbone: Backbone, method: str) -> None:
    chosen = Registry().get(method)
    lengths = chosen.prompt_lengths(backbone.spec, 5)
    params = chosen.init(backbone.spec, lengths, 7, torch.Generator().manual_seed(0))
    assert {name: tuple(value.shape) for name, value in params.items()} == chosen.shapes(backbone.spec, lengths, 7)
    again = chosen.init(backbone.spec, lengths, 7, torch.Generator().manual_seed(0))
    assert all(torch.equal(params[name], again[name]) for name in params)


@pytest.mark.parametrize("method", Registry().meanings)
def test_a_bundle_becomes_a_lens_and_answers(backbone: Backbone, method: str) -> None:
    registry, bench = Registry(), Bench(backbone)
    loaded = registry.load(bundle(backbone, method), backbone)
    (row,) = bench.engine.run([(np.zeros((64, 64, 3), np.uint8), bench.seat(loaded.lens))])
    assert row.shape == (4,)
    assert np.isfinite(row).all()


def refusal(backbone: Backbone, broken: Bundle) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        Registry().check(broken, backbone.spec)
    return caught.value


def test_a_bundle_for_another_backbone_names_both(backbone: Backbone) -> None:
    other = BundleBackbone("vit_other", "f" * 64)
    error = refusal(backbone, bundle(backbone, "vpt_deep", backbone=other))
    assert (error.status, error.code) == (409, "wrong_backbone")
    assert "vit_other" in error.detail
    assert backbone.spec.fingerprint in error.detail
    assert "f" * 64 in error.detail


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "vpt_deeper"}, "vpt_deeper"),
        ({"prompt_lengths": (4, 4, 4)}, "3 layers, the backbone has 4"),
        ({"prompt_lengths": (12, 0, 0, 0), "method": "vpt_shallow", "tensors": {"extra": np.zeros(3, "f4")}}, "extra"),
        ({"method": "linear"}, "no prompts"),
        ({"method": "vpt_shallow"}, "prompts in layers [0] only"),
        ({"tensors": {"prompts": np.zeros((12, 5), "f4")}}, r"prompts is (12, 5), expected (12, 64)"),
        ({"tensors": {"head.weight": np.zeros((4, 65), "f4")}}, "head.weight"),
    ],
)
def test_a_bundle_that_does_not_fit_its_method(backbone: Backbone, changes: dict[str, object], says: str) -> None:
    error = refusal(backbone, bundle(backbone, "vpt_deep", **changes))
    assert (error.status, error.code) == (400, "bad_bundle")
    assert says in error.detail


def test_another_image_size_is_refused(backbone: Backbone) -> None:
    error = refusal(backbone, bundle(backbone, "vpt_deep", preprocess=replace(backbone.spec.preprocess, size=96)))
    assert "96 px" in error.detail


class Constant:
    """A toy method from outside: answers the bias, whatever the picture."""

    name: ClassVar[str] = "constant"
    meaning: ClassVar[str] = "a toy"
    defaults: ClassVar[Mapping[str, object]] = {}
    candidates: ClassVar[Sequence[Mapping[str, object]]] = ()

    def prompt_lengths(self, spec: Spec, prompts: int) -> tuple[int, ...]:
        return (0,) * spec.depth

    def shapes(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int) -> Shapes:
        return head_shapes(spec, classes)

    def init(self, spec: Spec, prompt_lengths: tuple[int, ...], classes: int, generator: torch.Generator) -> Params:
        return {**head_init(spec, classes, generator), "head.bias": torch.arange(float(classes))}

    def lower(self, backbone: Backbone, params: Params, prompt_lengths: tuple[int, ...]) -> Lens:
        nothing = no_prefix(backbone.spec.depth, params["head.weight"])
        return Lens(nothing, nothing, nothing[0], params["head.weight"] * 0, params["head.bias"])


def test_a_method_from_outside_is_served_mixed_with_ours(backbone: Backbone) -> None:
    registry, bench = Registry(), Bench(backbone)
    registry.register(Constant())
    toy = registry.load(bundle(backbone, "constant", registry), backbone)
    deep = registry.load(bundle(backbone, "vpt_deep"), backbone)
    pixels = np.full((64, 64, 3), 7, np.uint8)
    alone = bench.engine.run([(pixels, bench.seat(deep.lens))])[0]
    first, second = bench.engine.run([(pixels, bench.seat(toy.lens)), (pixels, bench.seat(deep.lens))])
    np.testing.assert_array_equal(first, [0, 1, 2, 3])
    np.testing.assert_allclose(second, alone, atol=1e-4)
    with pytest.raises(ServiceError, match="expected one of"):
        Registry().get("constant")
