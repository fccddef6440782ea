"""timm without the compiler and the hub: not loaded by the import, there for whoever asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.engine.backbone import BUNDLED, UNTRAINED
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def told(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys\n" + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


LOADED = """
there = lambda: [name for name in ("torch._dynamo", "torch._inductor", "triton", "sympy") if name in sys.modules]
"""
LEAN = (
    LOADED
    + """
from server.engine.import_timm import import_timm
import_timm()
"""
)


def test_a_plain_import_loads_it_or_there_is_nothing_to_put_off() -> None:
    assert "torch._dynamo" in told(LOADED + "import timm; print(json.dumps(there()))")


def test_the_servers_import_does_not_and_neither_does_what_serves() -> None:
    served = """
import server.app.server, server.processes.manager, server.app.engine_runtime
import torch
from server.engine import backbone as backbones, vit
from server.engine.lens import Plain
backbone = backbones.load("untrained", device="cpu")
with torch.inference_mode():
    size = backbone.spec.image_size
    vit.forward(backbone, vit.embed(backbone, torch.zeros(1, 3, size, size)), Plain())
print(json.dumps(there()))
"""
    assert told(LEAN + served) == []


def test_a_worker_loads_it_with_its_first_optimizer(tmp_path: Path) -> None:
    working = f"""
import os
home = {str(tmp_path)!r}
os.environ |= {{"LENSRACK_HOME": home, "LENSRACK_BACKBONE": "untrained", "LENSRACK_DRAIN_TIMEOUT_S": "600"}}
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
from server.cli.work import work
work(until_stdin_closes=True)
idle = there()
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()
print(json.dumps([idle, bool((weight < 1).all()), "torch._dynamo" in there()]))
"""
    assert told(LOADED + working) == [[], True, True]


def test_who_wants_it_gets_the_real_one() -> None:
    modules = """
import torch, torchvision
before = there()
shape = list(torchvision.ops.roi_align(torch.rand(1, 3, 8, 8), [torch.tensor([[0.0, 0, 4, 4]])], 2).shape)
doubled = torch.compiler.disable(lambda x: 2 * x)(21)
print(json.dumps([before, shape, doubled, "torch._dynamo" in there(), hasattr(torch._dynamo, "OptimizedModule")]))
"""
    assert told(LEAN + modules) == [[], [1, 3, 2, 2], 42, True, True]


def test_what_was_marked_on_the_way_runs_and_is_marked() -> None:
    marked = """
import torch
from server.engine.import_timm import _put_off
with _put_off():
    later = torch.compiler.disable(lambda x, *, by: x * by, recursive=False)
    early = there()
print(json.dumps([early, later(6, by=7), there()]))
"""
    early, product, late = told(LEAN + marked)
    assert early == ["torch._dynamo"], "the stand-in alone"
    assert product == 42
    assert {"torch._dynamo", "torch._inductor"} <= set(late)


def test_where_it_is_loaded_already_nothing_is_put_off() -> None:
    before = "import torch._dynamo; own = sys.modules['torch._dynamo']\n"
    assert told(before + LEAN + "print(json.dumps(own is sys.modules['torch._dynamo']))")


HUBS = """
from server.engine.import_timm import import_timm
import_timm(hub={hub})
own = "huggingface_hub" in sys.modules
import timm
from timm.models import _hub
timm.create_model("vit_tiny_patch16_224", num_classes=0)
print(json.dumps([own, _hub.has_hf_hub(), "huggingface_hub" in sys.modules]))
"""


def test_the_hubs_client_is_loaded_where_timm_is_to_find_weights() -> None:
    assert told(HUBS.format(hub=True)) == [True, True, True]


def test_without_it_models_are_made_all_the_same() -> None:
    assert told(HUBS.format(hub=False)) == [False, False, False]


def test_without_it_others_may_import_it_afterwards() -> None:
    assert (
        told(HUBS.format(hub=False) + "import huggingface_hub as hub; print(json.dumps(hub.__name__))")
        == "huggingface_hub"
    )


def test_where_it_is_loaded_already_it_stays() -> None:
    assert told("import huggingface_hub\n" + HUBS.format(hub=False)) == [True, True, True]


@pytest.mark.parametrize(
    ("backbone", "weights", "downloads"),
    [
        (BUNDLED, None, False),
        (UNTRAINED, None, False),
        ("vit_base_patch16_224.augreg_in21k", None, True),
        ("vit_base_patch16_224", Path("base.safetensors"), False),
    ],
)
def test_only_timms_own_weights_have_to_be_found(backbone: str, weights: Path | None, downloads: bool) -> None:
    assert Settings(backbone=backbone, backbone_weights=weights).downloads_weights is downloads
