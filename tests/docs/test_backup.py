"""The page about backups is true: its commands save a server that works meanwhile, and an empty home comes to life."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import redis

from lensrack import Client
from server.cli.sample_pictures import draw
from server.jobs.redis_store import RedisJobStore
from tests.conftest import free_port
from tests.docs import pages
from tests.e2e.forked_server import forked
from tests.e2e.server_process import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EPOCHS = 400


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def new_key(home: Path) -> str:
    command = [sys.executable, "-m", "server", "keys", "create", "--scope", "admin"]
    done = subprocess.run(command, env=environment(home, {}), cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def test_a_living_home_is_restored_into_an_empty_one(tmp_path: Path, redis_url: str) -> None:
    home, port = tmp_path / "home", free_port()
    draw(tmp_path / "pictures", per_class=8)
    lemon = sorted((tmp_path / "pictures" / "fruit" / "test" / "lemon").iterdir())[0]
    key = new_key(home)
    with closing(RedisJobStore(redis_url)) as jobs:
        waiting = jobs.submit("t", "d", "linear", {}, max_attempts=1)
    with forked(home, workers="1") as server, Client(server.url, api_key=key) as client:
        dataset = client.datasets.upload(tmp_path / "pictures" / "fruit" / "train")
        for seed in (1, 2):
            client.train("fruit", dataset.id, method="linear", recipe={"seed": seed}).wait(timeout=120)
        client.tasks.rollback("fruit")
        client.feedback("fruit", lemon, "lemon")
        before, history = client.predict("fruit", lemon, top_k=3), client.tasks.history("fruit")
        running = client.train("long", dataset.id, method="vpt_deep", recipe={"epochs": EPOCHS, "prompts": 1})
        until(lambda: client.jobs.get(running.id).progress.epoch >= 2)
        places = {"127.0.0.1:6379": redis_url.removeprefix("redis://").partition("/")[0], "6380": str(port)}
        try:
            said = pages.run(ROOT / "docs" / "howto-backup.md", server, tmp_path, places)
            with closing(RedisJobStore(f"redis://127.0.0.1:{port}")) as jobs:
                assert jobs.get(waiting.id) == waiting
        finally:
            with redis.Redis(port=port) as restored:
                restored.shutdown(nosave=True, force=True)  # it may be writing its first append-only file
        assert client.jobs.get(running.id).state == "running", "the server has gone on"
        client.jobs.cancel(running.id)
    assert "exported 2 versions of 1 tasks" in said
    with forked(tmp_path / "restored", workers="1") as server, Client(server.url, api_key=key) as client:
        after = client.predict("fruit", lemon, top_k=3)
        assert after.version == before.version
        assert [(p.label, pytest.approx(p.score, abs=1e-5)) for p in after] == [(p.label, p.score) for p in before]
        assert [change.targets for change in client.tasks.history("fruit")] == [change.targets for change in history]
        assert client.datasets.get(dataset.id).images == dataset.images
        assert {job.state for job in client.jobs.list(task="fruit").jobs} == {"succeeded"}
        until(lambda: client.jobs.get(running.id).attempt == 2, 90)
        until(lambda: client.jobs.get(running.id).progress.epoch >= 2)
        client.jobs.cancel(running.id)
        again = client.tasks.freeze_feedback("fruit")
        assert again.images > dataset.images, "the feedback's picture is there"
        job = client.train("fruit", again.id, method="linear").wait(timeout=120)
        assert job.state == "succeeded"
