"""The blocks of a page, run from top to bottom in one shell, as a reader has one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.server_process import ROOT, ServerProcess, environment

SAMPLE = "server sample pictures --per-class 8"  # a third of a reader's pictures take a third of the time


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of what can be run; a block that is called `console` is shown only."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page: Path, server: ServerProcess, folder: Path, places: Mapping[str, str] | None = None) -> str:
    """What the blocks wrote to standard output. The shell stops at the first command that fails. `places`: texts of the
    page, and what stands for them here."""
    script = ["set -euo pipefail"]
    for number, (language, block) in enumerate(blocks(page)):
        script.append(f"echo '=== block {number}' >&2")
        script.append(f"python - <<'PYTHON'\n{block}PYTHON" if language == "python" else block)
    whole = "\n".join(script)
    own = {
        "127.0.0.1:8000": server.url.removeprefix("http://"),
        "@server/": f"@{ROOT}/server/",
        "server sample pictures": SAMPLE,
    }
    for shown, place in {**own, **(places or {})}.items():
        whole = whole.replace(shown, place)
    done = subprocess.run(
        ["bash", "-c", whole],
        env={**environment(server.home, {}), "LENSRACK_URL": server.url},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout
