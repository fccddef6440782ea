"""Other people's checkpoints, written in their own formats, become lenses that give the official numbers."""

from __future__ import annotations

import io
import json
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prompts_store import Bundle, open_store
from server.app.backbone import BackboneInfo, importer_for
from server.engine import lens, vit
from server.errors import Conflict, ServiceError, Unprocessable
from server.importing.importer import Importer, ImportOptions
from server.methods.registry import Registry
from tests.engine.golden_cases import Task, cases, drawing, golden_backbone, numbers, pixels, recipe, task, tolerance

Case = dict[str, Any]
CASES = {case["name"]: case for case in cases("forward") if case["arch"] == "vit_nano"}
ARCH, D, DEPTH = "vit_nano", 64, 4


def drawn(case: Case) -> dict[str, np.ndarray]:
    """The bundle as the official run had it, with the factors that its case asks for."""
    raw = recipe.bundle(case["method"], ARCH, case["p"], case["classes"], case["bundle_seed"], **drawing(case))
    scale = case.get("options", {})
    factors = {"prompts": scale.get("scale_prompts", 1), "head.weight": scale.get("scale_head", 1)}
    factors["head.bias"] = factors["head.weight"]
    return {name: (array * np.float32(factors.get(name, 1))) for name, array in raw.items()}


def official_backbone() -> dict[str, Tensor]:
    """The frozen weights of the golden cases by the names that KMnP/vpt gives them."""
    state: dict[str, Tensor] = {}
    for name, tensor in golden_backbone(ARCH, 101, torch.float32).model.state_dict().items():
        for old, new in (
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings"),
            ("blocks.", "encoder.layer."),
            ("norm1", "attention_norm"),
            ("norm2", "ffn_norm"),
            ("mlp.", "ffn."),
            ("attn.proj", "attn.out"),
        ):
            name = name.replace(old, new)  # noqa: PLW2901
        name = f"encoder.encoder_{name}" if name.startswith("norm.") else name  # noqa: PLW2901
        if "attn.qkv" in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            state |= {f"enc.transformer.{name.replace('qkv', part)}": chunk.clone() for part, chunk in parts}
        else:
            state[f"enc.transformer.{name}"] = tensor
    return state


def prompt_ep(case: Case) -> list[tuple[str, Any]]:
    raw = drawn(case)
    file = {"shallow_prompt": raw["prompts"][:1], "deep_prompt": raw["prompts"][1:]}
    head = {f"head.last_layer.{leaf}": torch.from_numpy(raw[f"head.{leaf}"]) for leaf in ("weight", "bias")}
    extra = {name: torch.from_numpy(array) for name, array in raw.items() if name.startswith("prompt_proj")}
    if len(raw["prompts"]) == 1:
        del file["deep_prompt"]
    return [("prompt_ep100.pth", file), ("head.pth", head | extra)]


def whole_vpt(case: Case) -> list[tuple[str, Any]]:
    raw = {name: torch.from_numpy(array) for name, array in drawn(case).items()}
    state = official_backbone() | {
        "enc.transformer.prompt_embeddings": raw["prompts"][:1],
        "enc.transformer.deep_prompt_embeddings": raw["prompts"][1:],
        **{f"enc.transformer.{name}": array for name, array in raw.items() if name.startswith("prompt_proj")},
        **{f"head.last_layer.{leaf}": raw[f"head.{leaf}"] for leaf in ("weight", "bias")},
    }
    return [("last_model.pth", {"model": state})]


def spt(case: Case) -> list[tuple[str, Any]]:
    """As the script writes it: a wrapped model, its optimiser, and a moving average with other values."""
    raw = {name: torch.from_numpy(array) for name, array in drawn(case).items()}
    prompts = torch.nn.Parameter(raw["prompts"])
    frozen = golden_backbone(ARCH, 101, torch.float32).model.state_dict()
    state = OrderedDict({"prompt_token": prompts, **frozen, **{n: raw[n] for n in ("head.weight", "head.bias")}})
    optimizer = torch.optim.AdamW([prompts])
    prompts.grad = torch.ones_like(prompts)
    with torch.no_grad():
        before = prompts.clone()
        optimizer.step()
        prompts.copy_(before)
    saved = {
        "epoch": 99,
        "model": OrderedDict((f"module.{name}", tensor) for name, tensor in state.items()),
        "optimizer": optimizer.state_dict(),
        "best_acc": np.float64(81.5),
        "model_ema": {name: tensor * 0 for name, tensor in state.items()},
    }
    return [("ckpt.pth", saved)]


def cvpt(case: Case) -> list[tuple[str, Any]]:
    raw = {name: torch.from_numpy(array) for name, array in drawn(case).items()}
    frozen = golden_backbone(ARCH, 101, torch.float32).model.state_dict()
    state = {"Prompt_Tokens": raw["prompts"], **{n: raw[n] for n in ("head.weight", "head.bias")}, **frozen}
    for layer in range(DEPTH):
        for leaf in ("weight", "bias"):
            block = f"blocks.{layer}"
            copies = zip("qkv", frozen[f"{block}.attn.qkv.{leaf}"].chunk(3), strict=True)
            state |= {f"{block}.CrossAttn.{part}.{leaf}": tensor for part, tensor in copies}
            state[f"{block}.CrossAttn.proj.{leaf}"] = frozen[f"{block}.attn.proj.{leaf}"]
    return [("cvpt.pth", state)]


def timm_head(case: Case) -> list[tuple[str, Any]]:
    return [("head.pth", {name: torch.from_numpy(array) for name, array in drawn(case).items()})]


def lightning(case: Case) -> list[tuple[str, Any]]:
    """A LightningModule's checkpoint: the model is its attribute `model`, beside a loss with weights for classes."""
    raw = {name: torch.from_numpy(array) for name, array in drawn(case).items()}
    model = {**golden_backbone(ARCH, 101, torch.float32).model.state_dict(), **raw}
    saved = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **{f"model.{name}": tensor for name, tensor in model.items()},
            "criterion.weight": torch.ones(6),
        },
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}],
        "hyper_parameters": {"lr": 0.1, "folder": Path("/a/b"), "classes": defaultdict(int, {"a": 1})},
    }
    return [("epoch=3.ckpt", saved)]


def transformers_model(case: Case) -> list[tuple[str, Any]]:
    """A whole ViTForImageClassification under the names of transformers 4, trained inside a LightningModule."""
    raw = {name: torch.from_numpy(array) for name, array in drawn(case).items()}
    state = {"classifier.weight": raw["head.weight"], "classifier.bias": raw["head.bias"]}
    for official, tensor in official_backbone().items():
        name = official.removeprefix("enc.transformer.")
        for old, new in (
            ("patch_embeddings.", "patch_embeddings.projection."),
            ("encoder.encoder_norm", "layernorm"),
            ("attention_norm", "layernorm_before"),
            ("ffn_norm", "layernorm_after"),
            ("attn.out", "attention.output.dense"),
            ("attn.", "attention.attention."),
            ("ffn.fc1", "intermediate.dense"),
            ("ffn.fc2", "output.dense"),
        ):
            name = name.replace(old, new)
        state[f"vit.{name}"] = tensor
    return [("x.ckpt", {"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}})]


WRITERS = {
    "vpt, prompts of an epoch": (prompt_ep, "nano-vpt_deep_p6", "assumed"),
    "vpt, shallow": (prompt_ep, "nano-vpt_shallow_p5", "assumed"),
    "vpt, projected": (prompt_ep, "nano-vpt_deep_project_p4", "assumed"),
    "vpt, a whole model": (whole_vpt, "nano-vpt_deep_p20", "verified"),
    "vpt, a whole model, projected": (whole_vpt, "nano-vpt_deep_project_p4", "verified"),
    "spt, deep": (spt, "nano-spt_deep_p4", "verified"),
    "spt, shallow": (spt, "nano-spt_shallow_p6", "verified"),
    "cvpt": (cvpt, "nano-cvpt_p5", "verified"),
    "timm, a head": (timm_head, "nano-linear", "assumed"),
    "timm, a whole model of Lightning": (lightning, "nano-linear", "verified"),
    "transformers, a whole model of Lightning": (transformers_model, "nano-linear", "verified"),
}


def files(parts: list[tuple[str, Any]], **how: Any) -> list[tuple[str, io.BytesIO]]:
    named = []
    for name, content in parts:
        file = io.BytesIO()
        torch.save(content, file, **how)
        named.append((name, file))
    for _, file in named:
        file.seek(0)
    return named


def own_importer() -> Importer:
    return importer_for(BackboneInfo.of(golden_backbone(ARCH, 101, torch.float32)), Registry())


def imported(parts: list[tuple[str, Any]], **options: Any) -> Bundle:
    importer = own_importer()
    with closing(open_store("memory://")) as store:
        return importer.bundle(parts, ImportOptions("birds", **options), store)


def served(bundle: Bundle, images: Tensor) -> Tensor:
    backbone = golden_backbone(ARCH, 101, torch.float32)
    lowered = Registry().lower(bundle, backbone)
    with torch.inference_mode():
        return vit.classify(
            vit.forward(backbone, vit.embed(backbone, images), lens.condition(lowered, len(images))), lowered
        )


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "stream"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_imported_task_gives_the_official_numbers(name: str, how: Mapping[str, Any]) -> None:
    write, golden, compared = WRITERS[name]
    case = CASES[golden]
    bundle = imported(files(write(case), **how))
    assert bundle.manifest.recipe["imported_from"] == name.partition(",")[0]
    assert bundle.manifest.recipe["backbone"] == compared
    assert bundle.manifest.labels == tuple(map(str, range(case["classes"])))
    logits = served(bundle, pixels(case, ARCH, torch.float32))
    truth = torch.from_numpy(numbers(case)["logits"])
    torch.testing.assert_close(logits, truth, atol=tolerance(case, torch.float32), rtol=0)


def test_what_is_imported_is_what_the_golden_bundle_holds() -> None:
    """To the last bit where nothing is folded."""
    case = CASES["nano-vpt_deep_p6"]
    golden: Task = task(case, ARCH, torch.float32)
    bundle = imported(files(prompt_ep(case)))
    assert (bundle.manifest.method, bundle.manifest.prompt_lengths) == (golden.method, golden.lengths)
    for name, tensor in golden.params.items():
        np.testing.assert_array_equal(bundle.tensors[name], tensor.numpy())


def test_labels_and_preprocessing_are_the_callers() -> None:
    case = CASES["nano-vpt_deep_p6"]
    parts = files(prompt_ep(case))
    default = imported(parts).manifest.preprocess
    assert (default.mean, default.interpolation, default.crop_pct) == ((0.485, 0.456, 0.406), "bilinear", 0.875)
    labels = [f"bird {number}" for number in range(case["classes"])]
    manifest = imported(parts, labels=labels, preprocess={"mean": [0.5, 0.5, 0.5], "crop_mode": "squash"}).manifest
    assert manifest.labels == tuple(labels)
    preprocess = manifest.preprocess
    assert (preprocess.mean, preprocess.crop_mode, preprocess.std) == ((0.5,) * 3, "squash", default.std)


def test_the_same_checkpoint_is_the_same_version() -> None:
    importer = own_importer()
    parts = files(prompt_ep(CASES["nano-vpt_deep_p6"]))
    with closing(open_store("memory://")) as store:
        first = importer.bundle(parts, ImportOptions("birds"), store)
        store.put(first)
        assert importer.bundle(parts[::-1], ImportOptions("birds"), store) == first
        assert importer.bundle(parts, ImportOptions("birds", preprocess={"crop_pct": 1.0}), store) != first


def refusal(parts: list[tuple[str, Any]], **options: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        imported(parts, **options)
    return caught.value


def changed(write: Any, golden: str, **arrays: Any) -> list[tuple[str, Any]]:
    """A checkpoint with other arrays in it, or without those that are None."""
    [(name, saved)] = write(CASES[golden])
    state = saved.get("model", saved)
    for key, value in arrays.items():
        old = key.replace("__", ".")
        state.pop(old, None)
        if value is not None:
            state[old] = value
    return [(name, saved)]


def test_another_backbone_is_refused_by_its_weights_or_shape() -> None:
    golden = golden_backbone(ARCH, 101, torch.float32).spec.fingerprint
    for arrays, said in (
        ({"module__norm__bias": torch.ones(D)}, golden),
        ({"module__pos_embed": torch.ones(1, 37, D)}, "pos_embed: expected [1, 17, 64] as in the running backbone"),
    ):
        error = refusal(files(changed(spt, "nano-spt_deep_p4", **arrays)))
        assert isinstance(error, Conflict)
        assert error.code == "wrong_backbone"
        assert said in error.detail


REFUSED: dict[str, tuple[list[tuple[str, Any]], str, str]] = {
    "no head": (prompt_ep(CASES["nano-vpt_deep_p6"])[:1], "no_head", "head.last_layer.weight"),
    "prompts of another width": (
        [("x.pth", {"shallow_prompt": np.ones((1, 2, 32), "f4"), "head.weight": torch.ones(2, D)})],
        "bad_checkpoint",
        "expected prompt_proj.weight [64, 32]",
    ),
    "prompts of another depth": (
        [("x.pth", {"prompt_token": torch.ones(12, 2, D), "head.weight": torch.ones(2, D)})],
        "bad_checkpoint",
        "expected [1, p, 64] or [4, p, 64]",
    ),
    "a head of another width": (
        [("x.pth", {"head.weight": torch.ones(2, 768), "head.bias": torch.ones(2)})],
        "bad_checkpoint",
        "expected [C, 64], got [2, 768]",
    ),
    "a head's bias of another length": (
        [("x.pth", {"head.weight": torch.ones(2, D), "head.bias": torch.ones(3)})],
        "bad_checkpoint",
        "expected [2], got [3]",
    ),
    "MAE": (
        changed(whole_vpt, "nano-vpt_deep_p20", enc__fc_norm__weight=torch.ones(D)),
        "bad_checkpoint",
        "pools over its prompts' outputs",
    ),
    "a hidden head": (
        changed(whole_vpt, "nano-vpt_deep_p20", head__projection__0__weight=torch.ones(D, D)),
        "bad_checkpoint",
        "hidden layers behind prompts",
    ),
    "a trained cross-attention": (
        changed(cvpt, "nano-cvpt_p5", blocks__1__CrossAttn__q__weight=torch.ones(D, D)),
        "bad_checkpoint",
        "got other, trained ones",
    ),
    "prompts of another tool": (
        [("x.pth", {"model.head.weight": torch.ones(2, D), "model.prompts.0": torch.ones(2, D)})],
        "bad_checkpoint",
        "'prompts.0' does not map",
    ),
    "two models in one": (
        [("x.ckpt", {"state_dict": {"net.head.weight": torch.ones(2, D), "model.head.weight": torch.zeros(2, D)}})],
        "bad_checkpoint",
        "got two arrays 'head.weight': 'net.head.weight' and 'model.head.weight'",
    ),
    "two classifiers": (
        [
            (
                "x.pth",
                {
                    "prompt_token": torch.ones(1, 2, D),
                    "head.weight": torch.ones(2, D),
                    "classifier.weight": torch.ones(2, D),
                },
            )
        ],
        "bad_checkpoint",
        "expected one classifier, got head.weight and classifier.weight",
    ),
    "nothing known": ([("x.pth", {"weight": torch.ones(2)})], "bad_checkpoint", "expected one of these formats: vpt"),
    "no dict": ([("x.pth", torch.ones(2))], "bad_checkpoint", "expected a dict of arrays"),
    "NaN": ([("x.pth", {"head.weight": torch.full((2, D), torch.nan)})], "bad_checkpoint", "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_map_is_refused_with_its_name(name: str) -> None:
    parts, code, message = REFUSED[name]
    error = refusal(files(parts))
    assert isinstance(error, Unprocessable)
    assert error.code == code
    assert message in error.detail


def test_wrong_words_are_refused() -> None:
    parts = files(timm_head(CASES["nano-linear"]))
    assert "labels: expected 6" in refusal(parts, labels=["a"]).detail
    assert refusal(parts, format="jax").code == "unknown_format"
    assert "prompt_embeddings" in refusal(parts, format="vpt").detail
    assert "'zoom'" in refusal(parts, preprocess={"zoom": 2}).detail
    assert "interpolation" in refusal(parts, preprocess={"interpolation": "cubic"}).detail
    assert "unique" in refusal(parts, labels=["a"] * 6).detail
    assert "several files" in refusal([*parts, *files(timm_head(CASES["nano-linear"]))]).detail


# --- Hugging Face PEFT ------------------------------------------------------------------------------------------------


def hugging_face_vit() -> Any:
    """The golden backbone as a transformers model: the same weights, the same epsilon."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=256, image_size=64,
        patch_size=16, num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    state = golden_backbone(ARCH, 101, torch.float32).model.state_dict()
    state_dict = model.state_dict()
    for name in state_dict:
        if not name.startswith("classifier"):
            state_dict[name] = _as_hugging_face(name, state).reshape(state_dict[name].shape)
    model.load_state_dict(state_dict)
    return model


def _as_hugging_face(name: str, state: Mapping[str, Tensor]) -> Tensor:
    module, _, leaf = name.removeprefix("vit.").rpartition(".")
    if leaf in ("cls_token", "position_embeddings"):
        return state["cls_token" if leaf == "cls_token" else "pos_embed"]
    if module.startswith("embeddings"):
        return state[f"patch_embed.proj.{leaf}"]
    if module == "layernorm":
        return state[f"norm.{leaf}"]
    layer, site = _layer_and_site(module)
    parts = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "query": 0, "key": 1, "value": 2}
    last = site.rsplit(".", 1)[-1]
    if last in parts:
        return state[f"blocks.{layer}.attn.qkv.{leaf}"].chunk(3)[parts[last]]
    known = {
        "attention.o_proj": "attn.proj", "attention.output.dense": "attn.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }  # fmt: skip
    return state[f"blocks.{layer}.{known[site]}.{leaf}"]


def _layer_and_site(module: str) -> tuple[str, str]:
    parts = module.split(".")
    place = next(index for index, part in enumerate(parts) if part.isdigit())
    return parts[place], ".".join(parts[place + 1 :])


def adapter(folder: Path, model: Any, **config: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """The tuned model, and its adapter as saved by the real library. Its parameters are drawn at random: a fresh lora_B
    is zero and changes nothing."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=6, **config)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tuned.save_pretrained(folder)
    names = ("adapter_config.json", "adapter_model.safetensors")
    return tuned, [(name, io.BytesIO((folder / name).read_bytes())) for name in names]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_of_a_transformers_vit(tmp_path: Path, rslora: bool) -> None:
    """With ranks and alphas of modules' own: by a module's name, an expression, one anchored at the start."""
    model = hugging_face_vit()
    query, value = ("q_proj", "v_proj") if any("q_proj" in name for name in model.state_dict()) else ("query", "value")
    start = next(name for name in model.state_dict() if f"1.attention.{query}" in name).removesuffix(".weight")
    tuned, parts = adapter(
        tmp_path, model, r=3, target_modules=[query, value], modules_to_save=["classifier"], use_rslora=rslora,
        rank_pattern={r"layers?\.(0|2)\.\S+": 2, f"^{start}": 5},
        alpha_pattern={f"^{start}": 11, f"[02]\\..*{value}": 0.5, value: 9},
    )  # fmt: skip
    images = pixels(CASES["nano-linear"], ARCH, torch.float32)
    with torch.inference_mode():
        truth = tuned(pixel_values=images).logits
    bundle = imported(parts)
    assert (bundle.manifest.method, bundle.manifest.prompt_lengths) == ("lora", (4, 8, 4, 6))
    torch.testing.assert_close(served(bundle, images), truth, atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_peft_of_a_timm_vit(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=D, depth=DEPTH, num_heads=4, num_classes=5)
    model.load_state_dict(golden_backbone(ARCH, 101, torch.float32).model.state_dict(), strict=False)
    tuned, parts = adapter(tmp_path, model, r=2, target_modules=["attn.qkv"], modules_to_save=["head"])
    images = pixels(CASES["nano-linear"], ARCH, torch.float32)
    with torch.inference_mode():
        truth = tuned(images)
    torch.testing.assert_close(served(imported(parts), images), truth, atol=2e-4, rtol=0)


def lora_files(folder: Path, config: Mapping[str, Any], **tensors: Tensor) -> list[tuple[str, io.BytesIO]]:
    """An adapter of the documented format, with the names of transformers 4."""
    full_config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], **config}
    site = "base_model.model.vit.encoder.layer.1.attention.attention.query"
    tensors = {
        f"{site}.lora_A.weight": torch.ones(2, D),
        f"{site}.lora_B.weight": torch.ones(D, 2),
        "base_model.model.classifier.weight": torch.ones(3, D),
        "base_model.model.classifier.bias": torch.ones(3),
        **{name.replace("__", "."): tensor for name, tensor in tensors.items()},
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return [
        ("adapter_config.json", io.BytesIO(json.dumps(full_config).encode())),
        ("adapter_model.safetensors", io.BytesIO((folder / "adapter_model.safetensors").read_bytes())),
    ]


def test_peft_with_the_names_of_transformers_4(tmp_path: Path) -> None:
    bundle = imported(lora_files(tmp_path, {}))
    assert bundle.manifest.prompt_lengths == (0, 2, 0, 0)
    up = bundle.tensors["lora.up"]
    assert (up[:, :D] == 2).all(), "alpha / r"
    assert not up[:, D:].any()
    patterns = {"r": 8, "rank_pattern": {"other": 4, "1.attention.attention.query": 2}, "use_rslora": True}
    patterns["alpha_pattern"] = {"key": 5, r"layer\.[0-9]\..*": 6, "query": 7}
    up = imported(lora_files(tmp_path, patterns)).tensors["lora.up"]
    np.testing.assert_allclose(up[:, :D], 6 / 2**0.5, rtol=1e-6, err_msg="alpha / √r, of the first patterns that match")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type LORA"),
        ({"use_dora": True}, {}, "use_dora does not map"),
        ({"bias": "all"}, {}, "bias: expected none, got 'all'"),
        ({"alpha_pattern": {"query": "8"}}, {}, "expected a number as alpha_pattern 'query', got '8'"),
        ({"alpha_pattern": {"(query": 8}}, {}, "alpha_pattern '(query': expected a module's name or a regular"),
        ({"rank_pattern": {"query": 4}}, {}, "query': expected rank 4 as adapter_config.json has it, got 2"),
        ({"r": 3}, {}, "expected rank 3"),
        ({"lora_bias": True}, {}, "lora_bias does not map"),
        ({"use_something_new": True}, {}, "use_something_new does not map"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights 'pissa_niter_4' does not map"),
        ({}, {"vit__layernorm__modules_to_save__weight": torch.ones(D)}, "layernorm.modules_to_save.weight' does not"),
        ({"lora_alpha": "8"}, {}, "a number as lora_alpha"),
        ({}, {"vit__encoder__layer__0__output__dense__lora_A__weight": torch.ones(2, 256),
              "vit__encoder__layer__0__output__dense__lora_B__weight": torch.ones(D, 2)}, "output.dense' does not map"),
        ({}, {"vit__encoder__layer__9__attention__attention__query__lora_A__weight": torch.ones(2, D)}, "4 layers"),
        ({}, {"vit__encoder__layer__0__attention__attention__key__lora_A__weight": torch.ones(2, D)}, "A and lora_B"),
        ({}, {"vit__encoder__layer__0__layernorm_before__bias": torch.ones(D)}, "layernorm_before.bias' does not map"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_map(tmp_path: Path, config: Any, tensors: Any, message: str) -> None:
    error = refusal(lora_files(tmp_path, config, **tensors))
    assert error.code == "bad_checkpoint"
    assert message in error.detail
    assert "expected one adapter_config.json" in refusal(lora_files(tmp_path, {})[1:]).detail
