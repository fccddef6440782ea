"""Golden cases of the methods we have: reference and fast path, alone and mixed, forward, gradient, training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine import lens, vit
from server.engine.backbone import Backbone
from server.methods.registry import Registry
from server.training.optimizer import make_optimizer
from server.training.recipe import Recipe
from tests.engine.golden_cases import (
    Bench,
    Task,
    cases,
    drawing,
    golden_backbone,
    name_of,
    numbers,
    pixels,
    recipe,
    task,
    tolerance,
)

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64]
LARGE = "vit_base_patch16_224"  # a forward of it takes seconds: most of its cases are long, vit_nano has the same ones


def expected(case: Mapping[str, Any], key: str, dtype: torch.dtype) -> Tensor:
    answers = numbers(case)
    wide = f"{key}64" if dtype == torch.float64 else key
    if wide not in answers:
        pytest.skip(f"{case['name']} has no {wide}")
    return torch.from_numpy(answers[wide])


def literal(backbone: Backbone, images: Tensor, task: Task) -> Tensor:
    return task.literal(backbone, images)


def fast(backbone: Backbone, images: Tensor, task: Task) -> Tensor:
    lowered = task.lens(backbone)
    features = vit.forward(backbone, vit.embed(backbone, images), lens.condition(lowered, len(images)))
    return vit.classify(features, lowered)


def setting(case: Mapping[str, Any], dtype: torch.dtype) -> tuple[Backbone, Task, Tensor]:
    arch = case["arch"]
    return golden_backbone(arch, case["backbone_seed"], dtype), task(case, arch, dtype), pixels(case, arch, dtype)


@pytest.mark.parametrize("case", cases("forward"), ids=name_of)
def test_the_inputs_are_those_of_the_official_runs(case: dict[str, Any]) -> None:
    options = drawing(case)
    bundle = recipe.bundle(case["method"], case["arch"], case["p"], case["classes"], case["bundle_seed"], **options)
    images = recipe.images(case["n"], recipe.ARCHS[case["arch"]]["size"], case["image_seed"])
    assert recipe.digest(bundle) == case["sha256"]["bundle"]
    assert recipe.digest({"images": images}) == case["sha256"]["images"]


def each_path(kind: str, large: Any) -> list[Any]:
    """Cases × types × paths. Of the large backbone all are long but those in float32 on the path `large`."""
    found = []
    for case, dtype, path in itertools.product(cases(kind), DTYPES, (literal, fast)):
        long = case["arch"] == LARGE and (dtype, path) != (torch.float32, large)
        name = f"{case['name']}-{dtype}-{path.__name__}"
        found.append(pytest.param(case, dtype, path, id=name, marks=[pytest.mark.long] if long else []))
    return found


@pytest.mark.parametrize(("case", "dtype", "path"), each_path("forward", large=literal))
def test_forward(case: dict[str, Any], dtype: torch.dtype, path: Any) -> None:
    backbone, task, images = setting(case, dtype)
    with torch.inference_mode():
        logits = path(backbone, images, task)
    torch.testing.assert_close(logits, expected(case, "logits", dtype), atol=tolerance(case, dtype), rtol=0)


def backbones() -> list[Any]:
    params = []
    for arch, dtype in itertools.product(("vit_nano", "deit_tiny_patch16_224", LARGE), DTYPES):
        long = arch == LARGE and dtype == torch.float64
        params.append(pytest.param(arch, dtype, id=f"{arch}-{dtype}", marks=[pytest.mark.long] if long else []))
    return params


@pytest.mark.parametrize(("arch", "dtype"), backbones())
def test_all_cases_of_a_backbone_in_one_mixed_batch(arch: str, dtype: torch.dtype) -> None:
    """Every forward case's rows, interleaved, in one forward: ragged prompts, shallow and deep, 3 … 100 classes.

    In float32 this is the fast path of the large backbone's cases too, of which it shows two pictures each.
    """
    forward = [case for case in cases("forward") if case["arch"] == arch]
    forward = [case for case in forward if dtype == torch.float32 or "logits64" in numbers(case)]
    if not forward:
        pytest.skip(f"no {dtype} numbers for {arch}")
    backbone = golden_backbone(arch, forward[0]["backbone_seed"], dtype)
    bench = Bench(backbone)
    with torch.inference_mode():
        seats = [bench.seat(task(case, arch, dtype).lens(backbone)) for case in forward]
        shown = 2 if arch == LARGE else 4
        rows = [(n, seat, index) for n, seat in enumerate(seats) for index in range(shown)]
        rows = rows[::2] + rows[1::2]
        x = vit.embed(backbone, torch.stack([pixels(forward[n], arch, dtype)[index] for n, _, index in rows]))
        logits = bench.engine.logits(x, [(position, seat) for position, (_, seat, _) in enumerate(rows)])
    for (n, _, index), row in zip(rows, logits, strict=True):
        truth = expected(forward[n], "logits", dtype)[index]
        torch.testing.assert_close(row, truth, atol=tolerance(forward[n], dtype), rtol=0, msg=forward[n]["name"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases("rows"), ids=name_of)
def test_rows_of_different_tasks(case: dict[str, Any], dtype: torch.dtype) -> None:
    backbone = golden_backbone(case["arch"], case["backbone_seed"], dtype)
    bench = Bench(backbone)
    with torch.inference_mode():
        seats = [bench.seat(task(row, case["arch"], dtype).lens(backbone)) for row in case["rows"]]
        x = vit.embed(backbone, pixels(case, case["arch"], dtype))
        logits = bench.engine.logits(x, list(enumerate(seats)))
    for index, row in enumerate(logits):
        key = f"logits64.{index}" if dtype == torch.float64 else f"logits.{index}"
        truth = torch.from_numpy(numbers(case)[key])
        torch.testing.assert_close(row, truth, atol=tolerance(case, dtype), rtol=0)


@pytest.mark.parametrize(("case", "dtype", "path"), each_path("grad", large=fast))
def test_gradients(case: dict[str, Any], dtype: torch.dtype, path: Any) -> None:
    backbone, task, images = setting(case, dtype)
    for parameter in task.params.values():
        parameter.requires_grad_(True)
    loss = F.cross_entropy(path(backbone, images, task), torch.tensor(case["labels"]))
    loss.backward()
    assert loss.item() == pytest.approx(expected(case, "loss", dtype).item(), abs=tolerance(case, dtype))
    layers = 1 if task.method == "vpt_shallow" else len(task.lengths)
    prompts = task.params["prompts"].grad.reshape(layers, -1, backbone.spec.dim)
    for key, answers in {
        "prompt_grad_slice": prompts[:, :2, :16],
        "prompt_grad_l2": prompts.flatten(1).norm(dim=1),
        "head_weight_grad": task.params["head.weight"].grad,
        "head_bias_grad": task.params["head.bias"].grad,
    }.items():
        truth = expected(case, key, dtype)
        torch.testing.assert_close(answers, truth, atol=tolerance(case, dtype) * truth.abs().max().item(), rtol=0)


def traces() -> list[Any]:
    params = []
    for case, dtype in itertools.product(cases("train"), DTYPES):
        long = case["arch"] == LARGE
        params.append(pytest.param(case, dtype, id=f"{case['name']}-{dtype}", marks=[pytest.mark.long] if long else []))
    return params


@pytest.mark.parametrize(("case", "dtype"), traces())
def test_training_trace(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Official SGD step by step, through our optimiser: momentum, weight decay, none on the head's bias."""
    backbone, task, images = setting(case, dtype)
    options = case["options"]
    params = {key: tensor.clone().requires_grad_(True) for key, tensor in task.params.items()}
    plan = Recipe(optimizer="sgd", lr=options["lr"], momentum=options["momentum"], weight_decay=options["weight_decay"])
    optimizer = make_optimizer(params, plan)
    labels, losses = torch.tensor(case["labels"]), []
    for step in range(options["steps"] + 1):
        logits = fast(backbone, images, Task(task.method, params, task.lengths))
        loss = F.cross_entropy(logits, labels)
        losses.append(loss.item())
        if step < options["steps"]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    atol = tolerance(case, dtype)
    np.testing.assert_allclose(losses, expected(case, "losses", dtype), atol=atol, rtol=0)
    with torch.inference_mode():
        layers = 1 if task.method == "vpt_shallow" else len(task.lengths)
        prompts = params["prompts"].reshape(layers, -1, backbone.spec.dim)
        for key, answers in {
            "final_logits": logits,
            "final_prompt_slice": prompts[:, :2, :16],
            "final_prompt_l2": prompts.flatten(1).norm(dim=1),
            "final_head_weight_l2": params["head.weight"].norm(dim=1),
            "final_head_bias": params["head.bias"],
        }.items():
            torch.testing.assert_close(answers, expected(case, key, dtype), atol=atol, rtol=0)


def test_the_registry_serves_every_method_of_the_golden_set() -> None:
    assert {"vpt_deep", "vpt_shallow", "linear"} <= set(Registry().meanings)
