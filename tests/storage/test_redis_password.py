"""The password of Redis out of a file: into the URLs that want one, and into nothing that is shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prompts_store import StoreUnavailable, open_store
from server.app.stores import open_jobs
from server.errors import Unavailable
from server.settings import Settings
from tests.e2e.server_process import ROOT, environment
from tests.storage.redis_servers import redis_with

PASSWORD = "hunter2/@:%?# ü"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    return path


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """A redis-server that wants the password; its URL, which does not hold it."""
    with redis_with(tmp_path, f'requirepass "{PASSWORD}"', password=PASSWORD) as url:
        yield f"{url}/3"


def test_stores_open_with_it_and_not_without(guarded: str, file: Path) -> None:
    settings = Settings(store=guarded, jobs=guarded, redis_password_file=file)
    store, jobs = open_store(settings.store_url), open_jobs(settings)
    assert store.tasks() == []
    assert jobs.list()[0] == []
    store.close()
    jobs.close()
    without = Settings(store=guarded, jobs=guarded)
    store, jobs = open_store(without.store_url), open_jobs(without)
    with pytest.raises(StoreUnavailable):
        store.tasks()
    with pytest.raises(Unavailable):
        jobs.list()
    store.close()
    jobs.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host:6379/0", "redis://:{}@host:6379/0"),
        ("rediss://me@host?ssl_cert_reqs=none", "rediss://me:{}@host?ssl_cert_reqs=none"),
        ("redis://:own@host", "redis://:own@host"),
        ("redis://[::1]:6379", "redis://:{}@[::1]:6379"),
        ("file:///somewhere", "file:///somewhere"),
        ("memory://", "memory://"),
    ],
)
def test_where_it_goes(url: str, expected: str, file: Path) -> None:
    """A URL that brings its own password keeps it."""
    quoted = "hunter2%2F%40%3A%25%3F%23%20%C3%BC"
    settings = Settings(store=url, jobs=url, redis_password_file=file)
    assert settings.store_url == settings.jobs_url == expected.format(quoted)
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"", "got 0"), (b"\n", "got 1"), (b"one\ntwo\n", "got 2"), (b"\xff\xfe", "not text")],
)
def test_a_file_that_gives_none_is_a_sentence(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="LENSRACK_REDIS_PASSWORD_FILE") as caught:
        _ = Settings(store="redis://host", redis_password_file=path).store_url
    assert said in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_whoever_starts_without_it_is_told(tmp_path: Path) -> None:
    own = {"store": "redis://127.0.0.1:1/0", "redis_password_file": str(tmp_path / "nowhere")}
    done = subprocess.run(
        [sys.executable, "-m", "server", "store", "export", str(tmp_path / "archive")],
        env=environment(tmp_path, own),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "LENSRACK_REDIS_PASSWORD_FILE: expected a file that can be read" in done.stderr
    assert "Traceback" not in done.stderr
