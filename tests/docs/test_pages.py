"""The pages are true: tutorial, how-tos and notebook run against a server."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs import pages
from tests.e2e.server_process import ROOT, ServerProcess, environment, serving

DOCS = ROOT / "docs"
RUN = ("howto-folder.md", "howto-canary.md")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(server: ServerProcess, tmp_path: Path, name: str) -> None:
    assert pages.blocks(DOCS / name)
    pages.run(DOCS / name, server, tmp_path)


def test_the_tutorial_makes_two_tasks(server: ServerProcess, tmp_path: Path) -> None:
    told = pages.run(DOCS / "tutorial.md", server, tmp_path)
    assert '"task":"sky"' in told or '"sky":{' in told.replace(" ", "")


def test_a_server_is_locked_as_the_page_says(tmp_path: Path) -> None:
    with serving(tmp_path / "home", workers="0") as running:
        told = pages.run(DOCS / "howto-secure.md", running, tmp_path)
    assert "exit code 1: it may not" in told


def test_every_page_with_blocks_is_run() -> None:
    """By a test that names the page, here or in another file of this folder."""
    elsewhere = {"architecture/05-adding-a-method.md"}  # tests/e2e/test_toy_method.py runs the whole of it
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        if page.parent.name != "reference" and pages.blocks(page) and name not in elsewhere:
            assert f'"{name}"' in tests, name


def test_the_notebook_runs(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(DOCS / "examples" / "first_steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without its outputs"
    own = {**environment(server.home, {}), "LENSRACK_URL": server.url, "IPYTHONDIR": str(tmp_path / "ipython")}
    monkeypatch.setattr(os, "environ", own)
    here = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=here).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert re.search(r"^shapes: .*epoch \d+/30", printed, re.MULTILINE), "progress in a notebook"
    [right] = re.findall(r"(\d+) of 20 right", printed)
    assert int(right) > 16
