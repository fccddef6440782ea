"""`python client/generate_sync.py`: write lensrack/client.py, the synchronous client, from lensrack/async_client.py.

Run it by `make sync-client` after a change of the asynchronous client; a test fails until then. It needs the standard
library and ruff, which removes unused imports and formats the result.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "lensrack"
SOURCE, TARGET = PACKAGE / "async_client.py", PACKAGE / "client.py"

HEADER = '''# Generated from async_client.py by client/generate_sync.py: change that file, then `make sync-client`.
"""The client for synchronous code. It only sends and waits; the rest is in `_core`, `_endpoints` and `_events`."""
'''
REPLACEMENTS = (  # in this order; a pattern that no longer occurs is an error
    (r'(?s)\A""".*?"""\n', HEADER),
    (r"safe to share between the tasks of one event loop", "safe to share between threads"),
    (r"  # noqa: ASYNC109.*", ""),
    (r"Awaitable\[T\]", "T"),
    (r"_async_runtime", "_sync_runtime"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\baclos(e|ing)\b", r"clos\1"),
    (r"\baiter_bytes\b", "iter_bytes"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
)
RUFF = (sys.executable, "-m", "ruff")
FIX = (*RUFF, "check", "--quiet", "--fix", "--unsafe-fixes", "--select", "F401,I,UP028")


def generate() -> str:
    """Return the text of the synchronous client."""
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in REPLACEMENTS:
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise SystemExit(f"{SOURCE.name}: expected {pattern!r} at least once")
    return _run(_run(text, *FIX), *RUFF, "format", "--quiet")


def _run(text: str, *command: str) -> str:
    arguments = [*command, "--stdin-filename", str(TARGET), "-"]
    return subprocess.run(arguments, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="utf-8")
