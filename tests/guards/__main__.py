"""`python -m tests.guards`: every mutation, in a copy of the tree; its test must pass before and fail after.

Prints the table of docs/results/guards.md. Status 1 where a mutation went unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.guards.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
TREE = ("server", "prompts_store", "client", "tests", "pyproject.toml", "README.md", "docs", "deploy")


def copied(folder: Path) -> Path:
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def passes(tree: Path, test: str) -> bool:
    """Raises RuntimeError where pytest could not run the test at all."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "120", test]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "client"))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test} cannot be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def noticed(tree: Path, mutation: Mutation) -> bool:
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise RuntimeError(f"{mutation.file}: expected {mutation.old!r} once, got it {text.count(mutation.old)} times")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return not passes(tree, mutation.test)
    finally:
        file.write_text(text, encoding="utf-8")


def row(mutation: Mutation, seen: bool) -> str:
    old, new = ((text.strip().splitlines() or ["nothing"])[0] for text in (mutation.old, mutation.new))
    change = f"`{old}` → `{new}`"
    verdict = "it failed" if seen else "**it passed**"
    return f"| {mutation.guards} | {mutation.file}: {change} | {mutation.test} | {verdict} |"


def main() -> None:
    unnoticed = 0
    print("| guard | what was broken | test | with the code broken |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="lensrack-guards-") as folder:
        tree = copied(Path(folder))
        for test in dict.fromkeys(mutation.test for mutation in MUTATIONS):
            if not passes(tree, test):
                raise RuntimeError(f"{test} fails with the code whole")
        for mutation in MUTATIONS:
            seen = noticed(tree, mutation)
            unnoticed += not seen
            print(row(mutation, seen), flush=True)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
