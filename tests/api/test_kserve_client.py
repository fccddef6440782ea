"""KServe's inference clients. Its package pins what we need newer, so it lives in an environment of its own:

python -m venv kserve && kserve/bin/pip install kserve && KSERVE_PYTHON=$PWD/kserve/bin/python make test
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.api.api_server import serving
from tests.serving.floor import png, publish

pytest.importorskip("grpc", reason="pip install grpcio")
PYTHON = os.environ.get("KSERVE_PYTHON") or (sys.executable if find_spec("kserve") else None)


@pytest.mark.skipif(PYTHON is None, reason="no environment with kserve (KSERVE_PYTHON)")
def test_its_clients_get_the_same_answers_in_every_way(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(png(9))
    with serving(tmp_path, grpc=True) as api:
        version = publish(api.floor.store, "digits")
        ours = api.http.post("/predict/digits", content=png(9), headers={"content-type": "image/png"}).json()
        script = Path(__file__).with_name("kserve_client.py")
        done = subprocess.run(
            [str(PYTHON), script, str(api.port), str(api.grpc_port), "picture.png"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["http"]["health"] == [True, True, True, False]
    assert found["grpc"]["health"] == [True, True, True]
    assert "404" in found["http"]["failure"]
    assert "nobody" in found["http"]["failure"]
    best = ours["predictions"][0][0]
    answers = [found["http"][way] for way in ("bytes", "pixels True", "pixels False")] + found["grpc"]["answers"]
    for answer in answers:
        assert answer["label"] == best["label"]
        assert max(answer["probabilities"]) == pytest.approx(best["score"], rel=1e-6)
    assert {one["version"] for one in found["grpc"]["answers"]} == {version}  # over HTTP the client drops it
