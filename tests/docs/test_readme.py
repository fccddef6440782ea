"""The README is true: its blocks run, in order, against a server that was started as it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import Settings
from tests.e2e.server_process import ROOT, ServerProcess, environment, serving

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("readme"), backbone="bundled") as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tour_runs_from_top_to_bottom(server: ServerProcess, tmp_path: Path) -> None:
    """One shell for all blocks, as a reader has one; it stops at the first command that fails."""
    script = ["set -euo pipefail"]
    for number, (language, block) in enumerate(BLOCKS):
        script.append(f"echo '=== block {number}' >&2")
        script.append(f"python - <<'PYTHON'\n{block}PYTHON" if language == "python" else block)
    url = server.url.removeprefix("http://")
    done = subprocess.run(
        ["bash", "-c", "\n".join(script).replace("127.0.0.1:8000", url).replace("@server/", f"@{ROOT}/server/")],
        env={**environment(server.home, {}), "LENSRACK_URL": server.url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert len(BLOCKS) >= 8
    assert '"label":"lemon"' in done.stdout.replace(" ", "")
    assert "plum" in done.stdout


def test_every_setting_it_names_exists() -> None:
    names = set(re.findall(r"LENSRACK_([A-Z_]+[A-Z])", README))
    known = {name.upper() for name in Settings.model_fields} | {"URL", "API_KEY"}  # the SDK's own two
    assert names <= known, names - known


def test_every_setting_says_what_it_means() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_every_file_it_links_to_exists() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
