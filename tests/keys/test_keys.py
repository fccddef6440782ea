"""Keys: tokens and their hashes, the file of a secret manager, whose a token is, and how much a key may take."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from server.clock import WallClock
from server.errors import NotFound, QueueFull
from server.keys import authenticator as authenticator_module
from server.keys import key as keys
from server.keys import meter as meter_module
from server.keys.authenticator import Authenticator
from server.keys.key import Allowance, Key
from server.keys.keys_file import BadKeysFile, KeysFile
from server.keys.meter import Meter
from server.keys.redis_store import RedisKeyStore
from server.keys.sqlite_store import SqliteKeyStore
from tests.conftest import free_port

pytestmark = pytest.mark.anyio

TOKEN = "a-token-of-a-secret-manager"


def slow_hash(token: str) -> str:
    """As older versions made it. A hash says itself what it costs; here it need not cost much."""
    salt = b"0123456789abcdef"
    return f"scrypt:4:8:1:{keys._text(salt)}:{keys._text(keys._scrypt(token, salt, 4, 8, 1))}"


# --- tokens and hashes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hashed", [keys.hashed, slow_hash], ids=["sha256", "scrypt"])
def test_a_hash_is_of_one_token_and_holds_nothing_of_it(hashed: Callable[[str], str]) -> None:
    token = keys.new_token("abc")
    kept = hashed(token)
    assert keys.matches(token, kept)
    assert not keys.matches(token + "x", kept)
    assert keys.is_hash(kept)
    assert token.split("_", 2)[2] not in kept


def test_a_fast_hash_is_salted_and_only_of_a_token_that_nobody_can_guess() -> None:
    token = keys.new_token("abc")
    assert keys.hashed(token) != keys.hashed(token)
    assert len(base64.urlsafe_b64decode(token.split("_", 2)[2] + "=")) == 32, "256 random bits"


@pytest.mark.parametrize(
    "kept",
    [
        *("", "x", "scrypt:14:8:1:AAAA", "scrypt:99:8:1:AAAA:AAAA", "scrypt:14:0:1:AAAA:AAAA", "scrypt:14:8:1:A:A"),
        *("sha256:AAAA", "sha256:A:A", "sha256:AAAA:AAAA", "sha512:AAAA:AAAA"),
    ],
)
def test_a_damaged_hash_matches_nothing(kept: str) -> None:
    assert not keys.matches(keys.new_token("abc"), kept)


def test_hashes_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one comparison that does so, whole digests each time; `==` is never asked."""
    compared: list[tuple[int, int, bool]] = []

    class Digest(bytes):
        __hash__ = bytes.__hash__

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared with ==")

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other), bytes(one) == bytes(other)))
        return compared[-1][2]

    token = keys.new_token("abc")
    scrypt, sha256 = keys._scrypt, keys._sha256
    both = slow_hash(token), keys.hashed(token)
    monkeypatch.setattr(keys, "_scrypt", lambda *arguments: Digest(scrypt(*arguments)))
    monkeypatch.setattr(keys, "_sha256", lambda *arguments: Digest(sha256(*arguments)))
    monkeypatch.setattr(keys.hmac, "compare_digest", watched)
    for kept in both:
        assert keys.matches(token, kept)
        assert not keys.matches(token[:-1] + "~", kept)
    assert compared == [(32, 32, True), (32, 32, False)] * 2


def test_the_id_of_a_token_is_read_from_it_and_from_nothing_else() -> None:
    for id_ in (keys.new_id(), "ci", "a-b-3"):
        assert keys.id_of(keys.new_token(id_)) == id_
    for other in ("", "lr__x", "lr_abc", TOKEN, keys.new_token("abc") + "\n", keys.new_token("abc").upper()):
        assert keys.id_of(other) is None


def test_admin_includes_the_other_scopes_and_no_other_includes_any() -> None:
    def may(*scopes: str) -> list[str]:
        return [scope for scope in keys.SCOPES if Key.model_validate({"id": "a", "scopes": scopes}).may(scope)]

    assert may("admin") == ["predict", "train", "admin"]
    assert may("train") == ["train"]
    assert may("predict", "train") == ["predict", "train"]


# --- the file ---------------------------------------------------------------------------------------------------------


def line(**changes: object) -> str:
    return json.dumps({"id": "ci", "scopes": ["predict"], "token": TOKEN} | changes)


def test_a_file_of_tokens_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    kept = keys.hashed(keys.new_token("ops"))
    ops = json.dumps({"id": "ops", "scopes": ["admin"], "hash": kept})
    path.write_text(f"# of the operator\n\n{line(tasks='acme-', images_per_s=2)}\n{ops}\n")
    (ci, token), (admin, none) = KeysFile(path).read()
    assert (ci.tasks, ci.allowance.images_per_s, ci.hash, token) == ("acme-", 2, "", TOKEN)
    assert (admin.hash, none, admin.scopes) == (kept, None, {"admin"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1"),
        (line(id="A b"), "id"),
        (line(scopes=[]), "scopes"),
        (line(scopes=["root"]), "scopes"),
        (line(token="short"), "token"),
        (line(token=None), "either a token or a hash"),
        (line(hash="scrypt:…"), "either a token or a hash"),
        (line(token=None, hash=TOKEN), "hash: expected sha256"),
        (line(tasks="Acme"), "tasks"),
        (line(quota=3), "quota"),
        (f"{line()}\n{line()}", "each id once"),
        ("x" * (2**20 + 1), "at most"),
    ],
)
def test_a_bad_file_is_told_by_its_line_and_never_quoted(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(BadKeysFile, match=said) as caught:
        KeysFile(path).read()
    assert TOKEN not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadKeysFile, match="can be read"):
        KeysFile(tmp_path / "keys").read()


# --- the authenticator ------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counted:
    """How often a token was really hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, keys.matches

        def counting(token: str, kept: str) -> bool:
            self.count += 1
            return real(token, kept)

        monkeypatch.setattr(authenticator_module, "matches", counting)


@pytest.fixture
def store(tmp_path: Path) -> SqliteKeyStore:
    return SqliteKeyStore(tmp_path / "keys.sqlite")


def made(store: SqliteKeyStore, id_: str = "abc", **changes: object) -> str:
    token = keys.new_token(id_)
    store.add(Key.model_validate({"id": id_, "scopes": ["predict"], "hash": keys.hashed(token), **changes}))
    return token


def opened(store: SqliteKeyStore, file: Path | None = None, clock: Clock | None = None) -> Authenticator:
    authenticator = Authenticator(store, KeysFile(file) if file else None, now=clock or time.time)
    authenticator.load()
    return authenticator


async def owner(authenticator: Authenticator, token: str) -> str | None:
    """As after the time that an answer is taken for fresh."""
    await authenticator.refresh(-1)
    found = await authenticator.owner(token)
    return found.id if found else None


async def test_a_token_is_its_keys_and_hashed_slowly_once(
    store: SqliteKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = keys.new_token("abc")
    store.add(Key(id="abc", scopes=frozenset({"predict"}), hash=slow_hash(token)))
    authenticator, counted = opened(store), Counted(monkeypatch)
    assert await asyncio.gather(*(owner(authenticator, token) for _ in range(5))) == ["abc"] * 5
    assert counted.count == 1
    wrong = keys.new_token("abc")
    assert [await owner(authenticator, wrong) for _ in range(3)] == [None] * 3
    assert counted.count == 2, "a wrong one costs its hash once, too"
    for strange in ("", "x", keys.new_token("nobody"), token[:-1] + "é", "\ud800", token + " "):
        assert await owner(authenticator, strange) is None
    assert counted.count == 2, "and what names no key costs none"


async def test_a_tenants_weight_is_the_largest_of_its_keys_that_hold(store: SqliteKeyStore, tmp_path: Path) -> None:
    for id_, tasks, weight, ended in (("a", "acme-", 2, None), ("b", "acme-", 3, None), ("c", "acme-", 9, 1.0)):
        made(store, id_, tasks=tasks, allowance={"weight": weight}, revoked_at=ended)
    made(store, "d", tasks="plain-")
    authenticator = opened(store)
    assert [authenticator.weight(tenant) for tenant in ("acme-", "plain-", "", "unknown-")] == [3, 1, 1, 1]
    made(store, "e", tasks="plain-", allowance={"weight": 0.5})
    await authenticator.refresh(-1)
    assert authenticator.weight("plain-") == 0.5


async def test_whoever_guesses_at_a_key_locks_nobody_out(
    store: SqliteKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has just started meets a flood of wrong secrets for one id: other keys are checked in their turn,
    and the key's own caller from another address; a key with a fast hash does not wait at all."""
    tokens = {id_: keys.new_token(id_) for id_ in ("guessed", "other")}
    for id_, token in tokens.items():
        store.add(Key(id=id_, scopes=frozenset({"predict"}), hash=slow_hash(token)))
    tokens["new"] = made(store, "new")
    authenticator, checked = opened(store), threading.Semaphore(0)
    real = keys.matches

    def waits(token: str, kept: str) -> bool:
        assert not keys.is_slow(kept) or checked.acquire(timeout=20)
        return real(token, kept)

    monkeypatch.setattr(authenticator_module, "matches", waits)
    guesses = [
        asyncio.create_task(authenticator.owner(keys.new_token("guessed"), f"10.0.0.{number % 3}"))
        for number in range(30)
    ]
    await asyncio.sleep(0)
    assert await authenticator.owner(tokens["new"], "10.0.0.1")
    good = [asyncio.create_task(authenticator.owner(tokens[id_], "10.0.0.9")) for id_ in ("other", "guessed")]
    for _ in range(100):
        await asyncio.sleep(0)
    assert sum(guess.done() for guess in guesses) == 30 - 3 * authenticator_module.WAITING_OF_ADDRESS
    checked.release(2)
    assert (await asyncio.wait_for(good[0], 20)).id == "other", "after one guess at most"
    checked.release(10)
    assert (await asyncio.wait_for(good[1], 20)).id == "guessed"
    outcomes = await asyncio.gather(*guesses, return_exceptions=True)
    assert [getattr(outcome, "code", outcome) for outcome in outcomes].count("rate_limited") == 24
    assert outcomes.count(None) == 6
    assert authenticator._rooms == {}


async def test_revocation_holds_at_once_and_never_opens_the_server(store: SqliteKeyStore) -> None:
    token = made(store)
    authenticator = opened(store)
    assert await owner(authenticator, token) == "abc"
    store.change("abc", lambda key: key.model_copy(update={"revoked_at": 1.0}))
    assert await owner(authenticator, token) is None
    assert authenticator.locked
    assert opened(store).locked, "also after a restart"


async def test_the_first_key_locks_a_server_that_runs(store: SqliteKeyStore) -> None:
    authenticator = opened(store)
    assert not authenticator.locked
    token = made(store)
    assert await owner(authenticator, token) == "abc"
    assert authenticator.locked


async def test_a_key_made_a_moment_ago_is_known(store: SqliteKeyStore) -> None:
    made(store, "old")
    authenticator = opened(store)
    await authenticator.refresh()
    token = made(store)
    await asyncio.sleep(authenticator_module.MISS_S + 0.01)
    found = await authenticator.owner(token)
    assert found is not None


async def test_an_old_token_holds_as_long_as_it_was_told_to(store: SqliteKeyStore) -> None:
    clock = Clock()
    old, new = made(store), keys.new_token("abc")
    authenticator = opened(store, clock=clock)
    assert await owner(authenticator, old) == "abc"
    store.change(
        "abc", lambda k: k.model_copy(update={"hash": keys.hashed(new), "old_hash": k.hash, "old_until": 1010.0})
    )
    assert [await owner(authenticator, old), await owner(authenticator, new)] == ["abc", "abc"]
    clock.now = 1010.0
    assert [await owner(authenticator, old), await owner(authenticator, new)] == [None, "abc"]


async def test_the_file_is_read_again_when_it_changes(store: SqliteKeyStore, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line())
    authenticator = opened(store, path)
    assert authenticator.locked
    assert await owner(authenticator, TOKEN) == "ci"
    path.write_text(line(token="another-token-of-the-same"))
    assert [await owner(authenticator, TOKEN), await owner(authenticator, "another-token-of-the-same")] == [None, "ci"]
    path.write_text("half a li")
    assert await owner(authenticator, "another-token-of-the-same") == "ci", "what cannot be used changes nothing"
    new = tmp_path / "new"
    new.write_text(line(id="ops"))
    os.replace(new, path)
    assert await owner(authenticator, TOKEN) == "ops"
    path.unlink()
    assert await owner(authenticator, TOKEN) == "ops"
    path.write_text("")
    assert await owner(authenticator, TOKEN) is None
    assert authenticator.locked, "an empty file opens nothing"


async def test_the_word_of_the_file_counts(store: SqliteKeyStore, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line())
    token = made(store, "ci")
    authenticator = opened(store, path)
    assert [await owner(authenticator, token), await owner(authenticator, TOKEN)] == [None, "ci"]


async def test_keys_outlive_their_store(store: SqliteKeyStore, tmp_path: Path) -> None:
    token = made(store)
    authenticator = opened(store)
    assert await owner(authenticator, token) == "abc"
    whole = (tmp_path / "keys.sqlite").read_bytes()
    (tmp_path / "keys.sqlite").write_bytes(b"no database at all" * 100)
    assert await owner(authenticator, token) == "abc"
    (tmp_path / "keys.sqlite").write_bytes(whole)
    store.change("abc", lambda key: key.model_copy(update={"revoked_at": 1.0}))
    for _ in range(100):
        if await owner(authenticator, token) is None:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the revocation was never seen")


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A redis-server of the test's own, to be stopped in its tracks, and its URL."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.05), 400)) as client:
        client.ping()
    yield process, f"redis://127.0.0.1:{port}/0"
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait(20)


async def test_nobody_waits_for_a_key_store_that_hangs(
    hanging: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Redis behind a network that has gone does, or a host's name that nobody knows any more."""
    monkeypatch.setattr(authenticator_module, "PATIENCE_S", 0.1)
    process, url = hanging
    store = RedisKeyStore(url)
    token = keys.new_token("abc")
    store.add(Key(id="abc", scopes=frozenset({"predict"}), hash=keys.hashed(token)))
    authenticator = Authenticator(store)
    authenticator.load()
    assert await owner(authenticator, token) == "abc"
    process.send_signal(signal.SIGSTOP)
    for _ in range(3):
        assert await owner(authenticator, token) == "abc"
        assert authenticator._reading is not None
        assert not authenticator._reading.done(), "who asked was answered before the store was"
    process.send_signal(signal.SIGCONT)
    await asyncio.wait_for(authenticator._reading, 60)
    store.change("abc", lambda key: key.model_copy(update={"revoked_at": 1.0}))
    monkeypatch.setattr(authenticator_module, "PATIENCE_S", 60.0)
    assert await owner(authenticator, token) is None
    authenticator.close()


async def test_nobody_waits_for_counts_that_hang(
    hanging: tuple[subprocess.Popen[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_module, "TIMEOUT_S", 60.0)
    process, url = hanging
    meter, key = Meter(url), allowed(images_per_s=0.05)
    monkeypatch.setattr(meter_module, "PATIENCE_S", 60.0)
    await meter.images(key, 1)
    monkeypatch.setattr(meter_module, "PATIENCE_S", 0.1)
    process.send_signal(signal.SIGSTOP)
    for _ in range(20):
        await meter.images(key, 1)
    assert meter._late is not None
    assert not meter._late.done(), "all were let in before one was counted"
    process.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(meter._late, 60), "the one that asked is counted, the others never asked"
    monkeypatch.setattr(meter_module, "PATIENCE_S", 60.0)
    with pytest.raises(QueueFull):
        await meter.images(key, 3)


def test_a_server_does_not_start_without_the_keys_it_was_given(store: SqliteKeyStore, tmp_path: Path) -> None:
    with pytest.raises(BadKeysFile):
        opened(store, tmp_path / "absent")


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "redis"])
def meters(request: pytest.FixtureRequest) -> tuple[Meter, Meter]:
    """Two servers' meters; those without Redis are one."""
    if request.param == "memory":
        return (meter := Meter()), meter
    url = str(request.getfixturevalue("redis_url"))
    return Meter(url), Meter(url)


def allowed(id_: str = "abc", **allowance: float) -> Key:
    return Key(id=id_, scopes=frozenset({"predict"}), allowance=Allowance.model_validate(allowance))


async def test_images_are_counted_over_all_servers(meters: tuple[Meter, Meter]) -> None:
    one, two = meters
    key = allowed(images_per_s=0.5)
    await one.images(key, 20)
    await two.images(key, 10)
    with pytest.raises(QueueFull, match="30 in a minute") as caught:
        await one.images(key, 1)
    assert caught.value.code == "rate_limited"
    assert 1 <= (caught.value.retry_after_s or 0) <= 61
    await one.images(allowed("other", images_per_s=0.5), 30)
    await one.images(allowed(), 10**6)


async def test_more_than_a_minutes_worth_never_passes_and_takes_nothing(meters: tuple[Meter, Meter]) -> None:
    key = allowed(images_per_s=1)
    with pytest.raises(QueueFull):
        await meters[0].images(key, 61)
    await meters[1].images(key, 60)


async def test_jobs_are_counted_over_a_day(meters: tuple[Meter, Meter]) -> None:
    key = allowed(jobs_per_day=2)
    async with meters[0].job(key):
        pass
    for meter in meters * 3:
        with pytest.raises(NotFound):
            async with meter.job(key):
                raise NotFound("what is refused is not counted")
    async with meters[1].job(key):
        pass
    with pytest.raises(QueueFull) as caught:
        async with meters[0].job(key):
            pass
    assert caught.value.code == "quota_exceeded"
    with pytest.raises(QueueFull):
        async with meters[0].job(allowed("none", jobs_per_day=0)):
            pass


async def test_nobody_is_refused_while_the_counts_are_away() -> None:
    meter = Meter("redis://127.0.0.1:1/0")
    for _ in range(3):
        await meter.images(allowed(images_per_s=0.001), 1)


async def test_a_prefix_that_two_tenants_may_share_is_told_once(
    store: SqliteKeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    for name, tasks in (("shared", "acme"), ("own", "acme-"), ("all", "")):
        store.add(Key(id=name, scopes=frozenset({"predict"}), tasks=tasks, hash=""))
    authenticator = Authenticator(store)
    authenticator.load()
    await authenticator.refresh(0)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["key shared covers every task whose name begins with 'acme', within words too"]


@pytest.mark.parametrize("jump_s", [-86_400.0, -60.0, 60.0, 86_400.0])
async def test_no_clock_lets_an_old_or_revoked_token_in_again(store: SqliteKeyStore, jump_s: float) -> None:
    wall, steady = Clock(), Clock()
    old, new = made(store), keys.new_token("abc")
    authenticator = Authenticator(store, now=WallClock(wall, steady).latest)
    authenticator.load()
    renewed = {"old_until": wall.now + 30, "hash": keys.hashed(new)}
    store.change("abc", lambda key: key.model_copy(update={"old_hash": key.hash, **renewed}))
    assert await owner(authenticator, old) == "abc"
    wall.now += jump_s
    assert await owner(authenticator, old) == ("abc" if jump_s < 0 else None)
    for clock in (wall, steady):
        clock.now += 31
    assert await owner(authenticator, old) is None, "its time was up, whatever the clock says"
    assert await owner(authenticator, new) == "abc"
    store.change("abc", lambda key: key.model_copy(update={"revoked_at": wall.now}))
    for back_s in (0.0, -1e6, 2e6):
        wall.now += back_s
        assert await owner(authenticator, new) is None


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
async def test_a_clock_that_is_set_locks_no_key_out(jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its minute is counted anew; and who is refused is told to come back within one."""
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    meter, key = Meter(), allowed(images_per_s=0.5)
    await meter.images(key, 30)
    ahead[0] = jump_s
    await meter.images(key, 30)
    with pytest.raises(QueueFull) as caught:
        await meter.images(key, 30)
    assert 1 <= (caught.value.retry_after_s or 0) <= 60


@pytest.mark.parametrize("kind", ["a hash", "a token in a file", "an old token"])
async def test_a_key_ends_at_its_time_and_no_clock_brings_it_back(
    store: SqliteKeyStore, kind: str, tmp_path: Path
) -> None:
    wall, steady = Clock(), Clock()
    file, token, ends = None, TOKEN, wall.now + 60
    if kind == "a token in a file":
        until = datetime.fromtimestamp(ends, UTC).isoformat()
        (tmp_path / "keys").write_text(
            json.dumps({"id": "abc", "scopes": ["predict"], "token": TOKEN, "expires_at": until})
        )
        file = KeysFile(tmp_path / "keys")
    else:
        token = made(store, expires_at=ends)
    if kind == "an old token":
        renewed = {"old_until": ends + 1000, "hash": keys.hashed(keys.new_token("abc"))}
        store.change("abc", lambda key: key.model_copy(update={"old_hash": key.hash, **renewed}))
    authenticator = Authenticator(store, file, now=WallClock(wall, steady).latest)
    authenticator.load()
    assert await owner(authenticator, token) == "abc"
    for clock in (wall, steady):
        clock.now += 60
    assert await owner(authenticator, token) is None
    wall.now -= 1e6
    assert await owner(authenticator, token) is None
    assert authenticator.locked
