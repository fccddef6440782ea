"""What a Redis server refuses for good is said as such: at the start with the setting, later in the error."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis

from prompts_store import CachedStore, StoreUnavailable, open_store
from server.app.stores import require_storage
from server.errors import ServiceError
from server.jobs.redis_store import RedisJobStore
from server.settings import Settings
from tests.conftest import free_port
from tests.storage.redis_servers import redis_with

LIMITED = "user some on >pw ~lensrack:* +@read +@connection +info"
REFUSALS = {
    "no password": (["requirepass pw"], "{}", "it requires a password"),
    "a wrong password": (["requirepass pw"], "redis://:other@{}", "does not accept the user or the password"),
    "a user who only reads": ([LIMITED], "redis://some:pw@{}", "its access list forbids"),
    "a user without channels": (
        ["acl-pubsub-default resetchannels", "user some on >pw ~lensrack:* +@all"],
        "redis://some:pw@{}",
        "its access list forbids",
    ),
    "a replica": (["replicaof 127.0.0.1 1"], "{}", "a replica that takes no writes"),
    "a cluster": (["cluster-enabled yes"], "{}", "part of a cluster"),
    "a database in a cluster": (["cluster-enabled yes"], "{}/3", "part of a cluster"),
    "no memory": (["maxmemory 1", "maxmemory-policy noeviction"], "{}", "out of memory"),
    "no such database": (["databases 4"], "{}/4", "no database of this number"),
}


def url_of(server: str, form: str) -> str:
    return form.format(server if form.startswith("{") else server.removeprefix("redis://"))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_ends_the_start_and_is_permanent_in_errors(name: str, tmp_path: Path) -> None:
    lines, form, why = REFUSALS[name]
    with redis_with(tmp_path / "redis", *lines) as server:
        url = url_of(server, form)
        with pytest.raises(ValueError, match=why) as caught:
            require_storage(Settings(home=tmp_path, jobs=url))
        assert str(caught.value).startswith("LENSRACK_JOBS")
        assert ("LENSRACK_REDIS_PASSWORD_FILE" in str(caught.value)) == ("password" in why)
        assert "pw" not in str(caught.value).replace("password", "")
        if name == "a user without channels":
            return  # jobs need none
        with closing(RedisJobStore(url)) as jobs, pytest.raises(ServiceError, match=why) as met:
            jobs.submit("t", "d", "linear", {}, max_attempts=1)
        assert "permanently" in met.value.detail or met.value.code == "disk_full"
        assert met.value.status in (503, 507)


def test_a_server_that_cannot_save_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    with redis_with(folder, "save 3600 1") as url, redis.Redis.from_url(url) as client:
        require_storage(Settings(home=tmp_path, store=url))
        folder.rmdir()
        client.set("a", 1)
        client.bgsave()
        deadline = time.monotonic() + 10
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok" and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(ValueError, match=r"LENSRACK_STORE.*cannot save to its disk"):
            require_storage(Settings(home=tmp_path, store=url))


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server that sends `reply` to whoever connects, as Redis does in protected mode."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(reply)
                    connection.recv(4096)

        threading.Thread(target=answer, daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_protected_mode_is_named_and_what_may_pass_does_not_end_the_start(tmp_path: Path) -> None:
    with (
        answering(b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n") as url,
        pytest.raises(ValueError, match="protected mode and has no password"),
    ):
        require_storage(Settings(home=tmp_path, keys=url))
    with answering(b"-LOADING Redis is loading the dataset in memory\r\n") as url:
        require_storage(Settings(home=tmp_path, store=url))
    require_storage(Settings(home=tmp_path, store=f"redis://127.0.0.1:{free_port()}"))


@pytest.mark.parametrize("url", ["redis://127.0.0.1/lensrack", "redis://127.0.0.1/1/2", "redis://127.0.0.1?db=x"])
def test_a_database_that_is_no_number_is_not_database_0(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LENSRACK_STORE: expected redis://.*number of the database"):
        require_storage(Settings(home=tmp_path, store=url))


def test_a_refusal_while_running_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompts_store.cached_store.REWATCH_S", 0.02)
    caplog.set_level(logging.WARNING)
    with (
        redis_with(tmp_path / "redis") as url,
        redis.Redis.from_url(url) as admin,
        closing(CachedStore(open_store(url))) as store,
    ):
        assert store.tasks() == []
        admin.config_set("requirepass", "pw")
        admin.client_kill_filter(_type="pubsub")
        admin.client_kill_filter(_type="normal", skipme=True)
        deadline = time.monotonic() + 5
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        with pytest.raises(StoreUnavailable, match="refuses, permanently: it requires a password"):
            store.history("t", "live")
    watching = [record.getMessage() for record in caplog.records if "watched" in record.getMessage()]
    assert len([line for line in watching if "permanently" in line]) == 1, watching
