"""What tests of stores share: bundles, ways to open each kind of store, waiting for changes, other processes."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from prompts_store import (
    AliasConflict,
    Backbone,
    Bundle,
    CachedStore,
    Manifest,
    Preprocess,
    Store,
    open_store,
)
from prompts_store.file_store import FileStore
from prompts_store.memory_store import MemoryStore

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 15.0  # far more than any change needs to be heard of
MANIFEST = Manifest(
    task="fish",
    method="linear",
    backbone=Backbone("vit", "0" * 64),
    labels=("a", "b"),
    prompt_lengths=(0,),
    preprocess=Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "squash"),
    metrics={},
    recipe={},
    dataset=None,
    parent=None,
    created_at=1000.0,
    lensrack_version="0.1.0",
)


@cache
def bundle(seed: int, task: str = "fish", created_at: float = 1000.0, size: int = 4) -> Bundle:
    weight = np.random.default_rng(seed).standard_normal((2, size), dtype=np.float32)
    return Bundle.build(replace(MANIFEST, task=task, created_at=created_at), {"head.weight": weight})


class Backend:
    """One kind of store: opens views of the same stored things, and closes them at the end."""

    def __init__(self, open_inner: Callable[[], Store], cached: bool) -> None:
        self._open_inner, self._cached = open_inner, cached
        self._opened: list[Store] = []

    def open(self) -> Store:
        inner = self._open_inner()
        store = CachedStore(inner) if self._cached else inner
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


def urls(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"file://{request.getfixturevalue('tmp_path') / 'store'}"


def opener(kind: str, request: pytest.FixtureRequest) -> Callable[[], Store]:
    if kind == "memory":
        shared = MemoryStore()
        return lambda: shared
    url = urls(kind, request)
    return lambda: open_store(url)


@contextmanager
def watching(store: Store) -> Iterator[queue.Queue[str]]:
    """The names of tasks that change while the block runs."""
    stop, heard = threading.Event(), queue.Queue()
    changes = store.watch(stop)
    thread = threading.Thread(target=lambda: [heard.put(change.task) for change in changes])
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join(5)
        assert not thread.is_alive(), "watch did not end with its stop event"


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not check():
        assert time.monotonic() < deadline, "it did not become so"
        threading.Event().wait(0.02)


def two_versions(store: Store, task: str = "fish") -> tuple[str, str]:
    return store.put(bundle(1, task)), store.put(bundle(2, task))


def increment(store: Store, version: str, times: int) -> None:
    """Move the alias on, `times` times, each by compare-and-set from the revision that was read."""
    for _ in range(times):
        while True:
            current = store.aliases("fish").get("live")
            try:
                store.set_alias("fish", "live", version, expect=current.revision if current else None)
                break
            except AliasConflict:
                continue


def consistent(root: Path) -> None:
    """Everything listed can be read, aliases point at what exists, nothing half written is left."""
    store = FileStore(root)
    for task in store.tasks():
        versions = {info.version for info in store.versions(task)}
        assert {store.get(task, version).version for version in versions} == versions
        for alias in store.aliases(task).values():
            assert {target.version for target in alias.targets} <= versions
    assert not [path for path in root.rglob("*") if path.name.startswith(".")]
    files = {path.name.removesuffix(".safetensors") for path in root.rglob("*.safetensors")}
    assert all(len(name) == 64 for name in files)


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process with this module's names at hand, `sys`, `os` and `itertools` besides."""
    prelude = "import itertools, os, sys\nfrom tests.prompts_store.stores import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output
