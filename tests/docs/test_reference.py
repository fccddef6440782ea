"""What docs/reference says is what the code gives, and the site that holds it is whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generator import pages, tables
from server import errors
from server.settings import Settings
from tests.e2e.server_process import ROOT

DOCS = ROOT / "docs"
PAGES = pages.pages()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_reference_is_what_the_code_gives(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name], "the code has changed: run `make reference`"


def test_no_page_of_the_reference_is_left_over() -> None:
    assert {f"reference/{path.name}" for path in (DOCS / "reference").iterdir()} <= PAGES.keys()


def test_every_setting_is_told() -> None:
    told = set(re.findall(r"^\| `LENSRACK_([A-Z_]+)`", PAGES["reference/settings.md"], re.MULTILINE))
    assert told == {name.upper() for name in Settings.model_fields}


def test_every_code_that_is_raised_is_in_the_tree_with_its_own_status() -> None:
    known = tables.codes()
    assert tables.raised() <= known.keys()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)]
    assert len(kinds) > 15
    assert all(known.get(kind.code, kind.status) == kind.status for kind in kinds)


def test_every_metric_is_told() -> None:
    source = (ROOT / "server" / "observability" / "metrics.py").read_text()
    names = re.findall(r'_(?:counter|gauge|histogram)\(\s*"(\w+)"', source)
    assert len(names) > 30
    assert {name for name, *_ in tables.known_metrics()} == {f"lensrack_{name}" for name in names}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does: a link that leads nowhere, or a page that no menu has, ends it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_is_whole(site: Path) -> None:
    for name in ("index", "tutorial", "changelog", "reference/settings", "explanation/prefix", "results/accuracy"):
        assert (site / f"{name}.html").is_file()
    assert (site / "source" / "tests" / "e2e" / "toy_method.py.txt").is_file()
    assert (site / "search" / "search_index.json").is_file()


def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    """Links that a reader follows may lead away; what a browser fetches by itself may not."""
    fetched = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")
    for page in site.rglob("*.html"):
        assert not fetched.findall(page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet
