"""No code of ours unpickles: not by pickle or a relative, not by torch.load, whatever its flags, not by NumPy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for floor in ("server", "prompts_store", "client") for file in sorted((ROOT / floor).rglob("*.py"))]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            if module in MODULES or (node.module in ("torch", "torch.serialization") and "load" in names):
                found.append(f"{node.module}: {sorted(names)}")
        elif isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            if node.attr == "load" and base in ("torch", "torch.jit", "torch.serialization"):
                found.append(f"{base}.load")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


def test_nothing_is_unpickled() -> None:
    assert len(FILES) > 300
    found = {str(file.relative_to(ROOT)): offences(file.read_text(encoding="utf-8")) for file in FILES}
    assert {file: offence for file, offence in found.items() if offence} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import joblib.externals",
    ],
)
def test_the_search_would_find_it(source: str) -> None:
    assert offences(source)


def test_the_disassembler_is_all_that_is_used_of_pickles() -> None:
    """`pickletools` takes a program apart and runs nothing of it; one file of ours needs it."""
    using = [file for file in FILES if "pickletools" in file.read_text(encoding="utf-8")]
    assert [file.name for file in using] == ["pickled.py"]
