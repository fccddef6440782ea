"""No code of ours runs text as a program, starts a shell, or fetches a URL for a client."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = [file for floor in ("server", "prompts_store") for file in sorted((ROOT / floor).rglob("*.py"))]
FILES = [*SERVER, *sorted((ROOT / "client").rglob("*.py"))]
TEXT_RUNNERS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "pty.spawn", "asyncio.create_subprocess_shell", "subprocess.getoutput",
          "subprocess.getstatusoutput", "runpy.run_path", "runpy.run_module", "code.interact"}  # fmt: skip
FETCHERS = {"httpx", "requests", "aiohttp", "urllib3", "urllib.request", "http.client", "ftplib", "fsspec"}
STARTERS = {  # who may start a process: this program again, an export, or the reader of parquet, with arguments of ours
    "server/app/exporter.py",
    "server/app/worker_pool.py",
    "server/datasets/formats/parquet_members.py",
}  # and benchmarks, which serve nobody: their own servers and peers
IMPORTERS = {  # names of a closed list
    "server/cli/tools.py",  # `bench NAME`
    "client/lensrack/__init__.py",  # the SDK's own modules, when a public name of theirs is asked for
}


def offences(source: str) -> list[str]:
    """What runs text or a shell, wherever it stands."""
    found = [name for name in imported(source) if name.split(".")[0] == "yaml" or name in SHELLS]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in TEXT_RUNNERS or called.removeprefix("builtins.") in TEXT_RUNNERS or called in SHELLS:
                found.append(called)
            if called.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
                found.append(called)
            if any(own.arg == "shell" and ast.unparse(own.value) != "False" for own in node.keywords):
                found.append(f"{called}(shell=…)")
    return found


def imported(source: str) -> set[str]:
    tree = ast.walk(ast.parse(source))
    return {
        name
        for node in tree
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }


def by_name(source: str) -> list[str]:
    """Modules that are imported by a name which is not written there."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [node for node in calls if ast.unparse(node.func) in ("importlib.import_module", "import_module")]
    return [ast.unparse(node) for node in named if not isinstance(node.args[0], ast.Constant)]


def path_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_nothing_runs_text_or_a_shell() -> None:
    found = {path_of(file): offences(file.read_text(encoding="utf-8")) for file in FILES}
    assert not {file: told for file, told in found.items() if told}
    assert len(found) > 200


def test_no_url_is_fetched_for_a_client() -> None:
    """Only benchmarks speak HTTP, to a server of their own; the server has nothing to speak it with."""
    using = {
        path_of(file)
        for file in SERVER
        if any(name == one or name.startswith(f"{one}.") for name in imported(file.read_text()) for one in FETCHERS)
    }
    assert {file for file in using if not file.startswith("server/bench/")} == set()


def test_processes_are_started_where_they_are_known_to_be() -> None:
    using = {path_of(file) for file in SERVER if "subprocess" in file.read_text(encoding="utf-8")}
    assert {file for file in using if not file.startswith("server/bench/")} == STARTERS


def test_modules_are_imported_by_names_of_ours() -> None:
    assert {path_of(file) for file in FILES if by_name(file.read_text(encoding="utf-8"))} <= IMPORTERS


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "builtins.eval(text)",
        "import yaml",
        "from yaml import safe_load",
        "os.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)",
        "subprocess.Popen(command, shell=wanted)",
        "await asyncio.create_subprocess_shell('ls')",
        "os.execvp('ls', [])",
    ],
)
def test_the_search_would_find_it(source: str) -> None:
    assert offences(source)


def test_the_other_searches_would_find_theirs() -> None:
    assert "urllib.request" in imported("from urllib import request")
    assert "httpx" in imported("def late():\n    import httpx")
    assert by_name("importlib.import_module(name)")
