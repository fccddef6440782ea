"""Bundles in Redis, and the URLs that name stores."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import redis

from prompts_store import (
    BadStoreUrl,
    CorruptBundle,
    StoreError,
    open_store,
)
from prompts_store.redis_store import RedisStore
from tests.prompts_store.stores import (
    SOON_S,
    bundle,
    two_versions,
    watching,
)


def test_reconcile_hears_what_pubsub_dropped(redis_url: str) -> None:
    """A change whose message never arrives: the stamp alone tells of it."""
    store, other = RedisStore(redis_url, reconcile_s=0.3), RedisStore(redis_url)
    other._channel = "somewhere-else"
    with watching(store) as heard:
        other.put(bundle(1))
        assert heard.get(timeout=SOON_S) == "fish"
    store.close()
    other.close()


def test_prefixes_are_apart(redis_url: str) -> None:
    mine, theirs = RedisStore(redis_url, prefix="mine"), RedisStore(redis_url, prefix="theirs")
    mine.put(bundle(1))
    assert (mine.tasks(), theirs.tasks()) == (["fish"], [])
    with redis.Redis.from_url(redis_url) as client:
        assert all(key.startswith(b"mine:") for key in client.scan_iter())
    mine.delete_task("fish")
    with redis.Redis.from_url(redis_url) as client:
        assert list(client.scan_iter()) == [b"mine:stamps"], "nothing but the stamp outlives a task without aliases"
    mine.close()
    theirs.close()


def test_a_commit_sent_twice_counts_once(redis_url: str) -> None:
    """As when the connection breaks after the server has done it and before it has said so."""
    store = RedisStore(redis_url)
    one = store.put(bundle(1))
    commit = store._commit
    store._commit = lambda **kwargs: [commit(**kwargs), commit(**kwargs)][1]  # type: ignore[assignment]
    assert store.set_alias("fish", "live", one).revision == 1
    assert store.set_alias("fish", "live", one, expect=1).revision == 2
    assert len(store.history("fish", "live")) == 2
    store.close()


def test_damage_in_redis_is_told(redis_url: str) -> None:
    store = RedisStore(redis_url)
    one, two = two_versions(store)
    with redis.Redis.from_url(redis_url) as client:
        client.delete(f"lensrack:store:task:fish:bundle:{one}")
        client.set(f"lensrack:store:task:fish:bundle:{two}", bundle(1).data)
        client.hset("lensrack:store:task:fish:versions", two, "{}")
    for version in (one, two):
        with pytest.raises(CorruptBundle):
            store.get("fish", version)
    assert [info.version for info in store.versions("fish")] == [one]
    store.put(bundle(1))
    assert store.get("fish", one) == bundle(1)
    store.close()


def test_the_password_is_in_no_error(redis_server: str) -> None:
    address = redis_server.removeprefix("redis://")
    secret = "hunter" + "2"  # so that this line, quoted in a traceback, does not hold it
    for url in (
        f"redis://ghost:{secret}@{address}/0",  # refused: there is no such user
        f"redis://user:{secret}@127.0.0.1:1/0",  # nobody there
        f"redis://:{secret}/x@127.0.0.1:1/0",  # unescaped: parsing finds the port "hunter…"
        f"redis://:x@127.0.0.1:{secret}/0",
        f"redis://:{secret}@127.0.0.1:1/0?{secret}=1",
        f"redis:/:{secret}@127.0.0.1",
        f"{secret}-x://x",
    ):
        with pytest.raises(StoreError) as caught:
            open_store(url).tasks()
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__)
        assert secret not in told
    assert secret not in repr(open_store(f"redis://:{secret}@{address}/0"))


@pytest.mark.parametrize("url", ["", "file://", "s3://bucket", "nonsense", "memory:", "redis:localhost"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(BadStoreUrl, match=r"expected .* got"):
        open_store(url)


def test_a_relative_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("file://a b/c").put(bundle(1))
    assert (tmp_path / "a b" / "c" / "tasks" / "fish").is_dir()
