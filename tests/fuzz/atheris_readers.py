"""`python -m tests.fuzz.atheris_readers READER SECONDS`: one reader under libFuzzer, guided by what its code covers.

What breaks it is written to tests/security/regressions/READER/, where the tests try it ever after.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["prompts_store", "server"]):
    from tests.fuzz.readers import READERS

REGRESSIONS = Path(__file__).resolve().parents[1] / "security" / "regressions"


def main(name: str, seconds: str) -> None:
    reader, found = READERS[name], REGRESSIONS / name
    found.mkdir(parents=True, exist_ok=True)
    corpus = Path(tempfile.mkdtemp(prefix="lensrack-corpus-"))
    for number, seed in enumerate(reader.seeds()):
        (corpus / str(number)).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-max_len=65536", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup(["fuzz", str(corpus), *limits, f"-artifact_prefix={found}/"], reader.survives)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
