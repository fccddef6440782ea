"""The pages about other people's clients are true: their blocks run, in order, against a server with ready tasks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.e2e.server_process import ROOT, ServerProcess, environment, serving

GRPC_PORT = str(free_port())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    port = GRPC_PORT if find_spec("grpc") else "0"
    with serving(tmp_path_factory.mktemp("howto"), backbone="bundled", grpc_port=port) as running:
        yield running


def told(page: str, server: ServerProcess, folder: Path) -> str:
    """What the page's blocks print, in one shell that stops at the first command that fails."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    script = ["set -euo pipefail"]
    script += [f"python - <<'PYTHON'\n{block}PYTHON" if kind == "python" else block for kind, block in blocks]
    whole = "\n".join(script).replace("127.0.0.1:8000", server.url.removeprefix("http://"))
    (folder / "server").symlink_to(ROOT / "server")
    done = subprocess.run(
        ["bash", "-c", whole.replace("127.0.0.1:8001", f"127.0.0.1:{GRPC_PORT}")],
        env={**environment(server.home, {}), "LENSRACK_URL": server.url},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def test_the_open_inference_protocol(server: ServerProcess, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.http", reason="pip install tritonclient[http]")
    pytest.importorskip("tritonclient.grpc", reason="pip install tritonclient[grpc]")
    out = told("howto-oip.md", server, tmp_path)
    assert re.search(r'"datatype": "BYTES", "shape": \[1, 2\], "data": \["[01]\.\d+:7:7"', out), out
    assert "label 7" in out
    assert "over gRPC 7" in out


def test_openais_client(server: ServerProcess, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="pip install openai")
    out = told("howto-openai.md", server, tmp_path)
    assert "info epoch:" in out
    assert re.search(r"succeeded fruit@[0-9a-f]{64}", out), out
    assert "192 numbers" in out
    assert "lemon" in out
