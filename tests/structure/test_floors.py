"""What each floor loads when it is imported, tried in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVICE = {
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "redis",
    "httpx",
    "prometheus_client",
    "inotify_simple",
    "watchfiles",
}


def loaded_by(*modules: str) -> set[str]:
    code = f"import sys; [__import__(name) for name in {modules!r}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_engine_methods_and_training_need_no_package_of_the_service() -> None:
    names = ("server.engine.engine", "server.engine.residency", "server.methods.registry", "server.training.fit")
    assert not SERVICE & loaded_by(*names)


def test_what_is_tried_on_a_gpu_machine_needs_none_either() -> None:
    assert not (SERVICE | {"typer", "rich", "pytest"}) & loaded_by("server.bench.device", "server.bench.ladder")


def test_a_worker_needs_nothing_that_speaks_http() -> None:
    assert not {"fastapi", "starlette", "uvicorn"} & loaded_by("server.app.worker")


@pytest.mark.parametrize(
    "module",
    [
        "prompts_store",
        "server.batching.scheduler",
        "server.jobs.sqlite_store",
        "server.importing.importer",
        "server.app.stores",
    ],
)
def test_what_needs_no_torch_loads_none(module: str) -> None:
    assert not {"torch", "timm"} & loaded_by(module)


def test_the_sdk_loads_nothing_of_the_server() -> None:
    assert not {"torch", "numpy", "fastapi", "server", "prompts_store"} & loaded_by("lensrack")
