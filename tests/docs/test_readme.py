"""The README is true: its blocks run, in order, against a server that was started as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.methods.registry import BASELINES, METHODS
from server.settings import Settings
from tests.docs import pages
from tests.e2e.server_process import ROOT, ServerProcess

SDK_READS = {"URL", "API_KEY", "TIMEOUT", "RETRIES"}
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tour_runs_from_top_to_bottom(server: ServerProcess, tmp_path: Path) -> None:
    told = pages.run(ROOT / "README.md", server, tmp_path)
    assert len(pages.blocks(ROOT / "README.md")) >= 8
    assert '"label":"lemon"' in told.replace(" ", "")
    assert "plum" in told


def test_every_setting_it_names_exists() -> None:
    names = set(re.findall(r"LENSRACK_([A-Z_]+[A-Z])", README))
    known = {name.upper() for name in Settings.model_fields} | SDK_READS
    assert names <= known, names - known


def test_its_table_of_methods_is_complete() -> None:
    """Every method and baseline there is, and none that is not."""
    table = README.partition("## Methods")[2].partition("\n\nAll served methods")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    words = [word for cell in first for word in re.findall(r"`([^`]+)`", cell)]
    named = {f"partial{word}" if word.startswith("-") else word for word in words}
    assert named == {method.name for method in (*METHODS, *BASELINES)}


def test_every_setting_says_what_it_means() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_every_file_it_links_to_exists() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
