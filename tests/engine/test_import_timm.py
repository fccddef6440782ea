"""timm without the compiler and the hub: not loaded by the import, there for whoever asks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.backbone import BUNDLED, UNTRAINED
from server.settings import Settings

Told = Callable[[str], Any]
ROOT = Path(__file__).resolve().parents[2]


FORKS = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    if os.fork() == 0:
        try:
            exec(json.loads(line), {"json": json, "sys": sys})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    """A process that has loaded torch and nothing else, and runs each line of code in a fork of its own."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def told(forks: subprocess.Popen[str]) -> Told:
    """Runs code and returns what its last line says."""

    def told(code: str) -> Any:
        forks.stdin.write(json.dumps(code) + "\n")
        forks.stdin.flush()
        said = []
        while (line := forks.stdout.readline()) not in ("done\n", ""):
            said.append(line)
        return json.loads(said[-1])

    return told


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


def test_a_plain_import_loads_it_or_there_is_nothing_to_put_off(told: Told) -> None:
    assert "torch._dynamo" in told(LOADED + "import timm; print(json.dumps(there()))")


def test_the_servers_import_does_not_and_neither_does_what_serves(told: Told) -> None:
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


def test_a_worker_loads_it_with_its_first_optimizer(told: Told, tmp_path: Path) -> None:
    working = f"""
import threading
from pathlib import Path
from server.settings import Settings
from server.engine.import_timm import import_timm
settings = Settings(home=Path({str(tmp_path)!r}), backbone="untrained")
import_timm(hub=settings.downloads_weights)
from server.app.worker import run_worker
stop = threading.Event()
stop.set()
assert run_worker(settings, stop) == 0
idle = there()
import torch
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
weight.sum().backward()
optimizer.step()
print(json.dumps([idle, bool((weight < 1).all()), "torch._dynamo" in there()]))
"""
    assert told(LOADED + working) == [[], True, True]


def test_who_wants_it_gets_the_real_one(told: Told) -> None:
    modules = """
import torch, torchvision
before = there()
shape = list(torchvision.ops.roi_align(torch.rand(1, 3, 8, 8), [torch.tensor([[0.0, 0, 4, 4]])], 2).shape)
doubled = torch.compiler.disable(lambda x: 2 * x)(21)
print(json.dumps([before, shape, doubled, "torch._dynamo" in there(), hasattr(torch._dynamo, "OptimizedModule")]))
"""
    assert told(LEAN + modules) == [[], [1, 3, 2, 2], 42, True, True]


def test_what_was_marked_on_the_way_runs_and_is_marked(told: Told) -> None:
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


def test_where_it_is_loaded_already_nothing_is_put_off(told: Told) -> None:
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


def test_the_hubs_client_is_loaded_where_timm_is_to_find_weights(told: Told) -> None:
    assert told(HUBS.format(hub=True)) == [True, True, True]


def test_without_it_models_are_made_all_the_same(told: Told) -> None:
    assert told(HUBS.format(hub=False)) == [False, False, False]


def test_without_it_others_may_import_it_afterwards(told: Told) -> None:
    assert (
        told(HUBS.format(hub=False) + "import huggingface_hub as hub; print(json.dumps(hub.__name__))")
        == "huggingface_hub"
    )


def test_where_it_is_loaded_already_it_stays(told: Told) -> None:
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
