"""What every key store promises, held against each backend. A new backend is one more entry in BACKENDS."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import Conflict, NotFound, Unavailable
from server.keys.key import Allowance, Key
from server.keys.store import KeyStore
from server.keys.url import open_keys

BACKENDS = ("sqlite", "redis")


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"sqlite://{tmp_path / 'home' / 'keys.sqlite'}"


@pytest.fixture
def store(url: str) -> Iterator[KeyStore]:
    opened = open_keys(url)
    yield opened
    opened.close()


def key(id_: str, **changes: object) -> Key:
    return Key.model_validate({"id": id_, "scopes": ["predict"], "hash": "scrypt:…", "created_at": 1.0, **changes})


def named(name: str) -> Callable[[Key], Key]:
    return lambda known: known.model_copy(update={"name": name})


def test_there_are_none_at_first(store: KeyStore) -> None:
    assert store.list() == []


def test_what_is_added_is_there_whole_for_whoever_opens_it(store: KeyStore, url: str) -> None:
    allowance = Allowance(images_per_s=2.5, jobs_per_day=3, bytes_stored=10, weight=0.5)
    made = key("a", scopes=["admin", "train"], tasks="acme-", name="Ä", allowance=allowance, old_hash="x", old_until=9)
    store.add(made)
    other = open_keys(url)
    assert other.list() == [made]
    other.close()


def test_they_come_oldest_first(store: KeyStore) -> None:
    for id_, at in (("b", 2.0), ("a", 3.0), ("c", 1.0)):
        store.add(key(id_, created_at=at))
    assert [one.id for one in store.list()] == ["c", "b", "a"]


def test_an_id_is_given_once(store: KeyStore) -> None:
    store.add(key("a", name="first"))
    with pytest.raises(Conflict) as caught:
        store.add(key("a", name="second"))
    assert caught.value.code == "key_exists"
    assert store.list()[0].name == "first"


def test_a_change_is_kept(store: KeyStore) -> None:
    store.add(key("a"))
    assert store.change("a", named("new")).name == "new"
    assert store.list() == [key("a", name="new")]


def test_an_unknown_key_cannot_change(store: KeyStore) -> None:
    store.add(key("b"))
    with pytest.raises(NotFound) as caught:
        store.change("a", named("new"))
    assert caught.value.code == "key_not_found"


def test_a_change_that_fails_changes_nothing(store: KeyStore) -> None:
    store.add(key("a"))

    def fail(_: Key) -> Key:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.change("a", fail)
    assert store.change("a", named("later")).name == "later"


def test_no_change_is_lost(store: KeyStore) -> None:
    store.add(key("a", created_at=0.0))

    def one_more(known: Key) -> Key:
        return known.model_copy(update={"created_at": known.created_at + 1})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.change("a", one_more), range(24)))
    assert store.list()[0].created_at == 24


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    store = open_keys(f"sqlite://{path}")
    assert store.list() == []
    assert not path.exists(), "asking makes no file"
    store.add(key("a"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_store_is_told_and_never_taken_for_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite"
    path.write_bytes(b"this is no database, though it is long enough to look at" * 20)
    with pytest.raises(Unavailable) as caught:
        open_keys(f"sqlite://{path}").list()
    assert str(tmp_path) not in caught.value.detail


def test_a_redis_that_is_away_is_told_without_its_password() -> None:
    store = open_keys("redis://:secretword@127.0.0.1:1/0")
    with pytest.raises(Unavailable) as caught:
        store.list()
    assert "secretword" not in repr(store) + caught.value.detail
    store.close()


@pytest.mark.parametrize("url", ["", "file:///x", "redis", "sqlite://", "redis://:secretword@:x"])
def test_other_urls_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        open_keys(url)
    assert "secretword" not in str(caught.value)
