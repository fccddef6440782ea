"""`python -m server keys …`: tokens are printed once, to standard output only, errors are messages, not tracebacks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.keys import cli
from server.keys import key as keys
from server.keys.keys_file import KeysFile
from server.keys.sqlite_store import SqliteKeyStore


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LENSRACK_HOME", str(tmp_path))
    return tmp_path


def run(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exit_code == status, done.output
    return done


def kept(home: Path) -> list[keys.Key]:
    return SqliteKeyStore(home / "keys.sqlite").list()


def test_a_key_is_made_told_once_and_kept_as_a_hash(home: Path) -> None:
    limits = ("--images-per-s", "2.5", "--jobs-per-day", "3", "--bytes-stored", "10", "--weight", "3")
    done = run("create", "--scope", "predict", "--scope", "train", "--tasks", "acme-", "--id", "ci", *limits)
    token = done.stdout.strip()
    assert keys.id_of(token) == "ci"
    assert token not in done.stderr
    (key,) = kept(home)
    assert keys.matches(token, key.hash)
    assert (key.scopes, key.tasks) == ({"predict", "train"}, "acme-")
    assert key.allowance == keys.Allowance(images_per_s=2.5, jobs_per_day=3, bytes_stored=10, weight=3)
    assert token.split("_")[2].encode() not in (home / "keys.sqlite").read_bytes()
    for listed in (run("list").output, run("list", "--json").output):
        assert "ci" in listed
        assert key.hash not in listed
    assert "there is a key 'ci' already" in run("create", "--scope", "admin", "--id", "ci", status=1).stderr


def test_a_rotated_key_has_another_token_and_keeps_the_old_one_as_long_as_told(home: Path) -> None:
    old = run("create", "--scope", "admin", "--id", "ops").stdout.strip()
    new = run("rotate", "ops", "--keep-s", "60").stdout.strip()
    (key,) = kept(home)
    assert keys.matches(new, key.hash)
    assert keys.matches(old, key.old_hash)
    last = run("rotate", "ops").stdout.strip()
    (key,) = kept(home)
    assert keys.matches(last, key.hash)
    assert key.old_hash == ""


def test_a_revoked_key_stays_on_record_and_cannot_come_back(home: Path) -> None:
    run("create", "--scope", "admin", "--id", "ops")
    run("revoke", "ops")
    (key,) = kept(home)
    assert key.revoked_at is not None
    assert "revoked" in run("list").output
    assert run("rotate", "ops", status=1).stdout == ""
    run("revoke", "ops")
    assert kept(home) == [key]


def test_a_key_for_the_file_is_stored_nowhere(home: Path) -> None:
    token, line = run(
        "create", "--scope", "predict", "--tasks", "a-", "--jobs-per-day", "2", "--for-file"
    ).stdout.split("\n")[:2]
    assert kept(home) == []
    (home / "keys").write_text(line)
    ((key, none),) = KeysFile(home / "keys").read()
    assert none is None
    assert keys.matches(token, key.hash)
    assert (key.tasks, key.allowance.jobs_per_day) == ("a-", 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--scope", "root"], "scopes"),
        (["create", "--scope", "predict", "--tasks", "Acme"], "tasks"),
        (["create", "--scope", "predict", "--images-per-s", "0"], "images_per_s"),
        (["create", "--scope", "predict", "--weight", "0"], "weight"),
        (["create"], "--scope"),
    ],
)
def test_what_no_key_can_be_is_told(home: Path, arguments: list[str], said: str) -> None:
    assert said in run(*arguments, status=2).output
    assert kept(home) == []


def test_an_unknown_key_is_told(home: Path) -> None:
    run("create", "--scope", "admin", "--id", "ops")
    for command in ("revoke", "rotate"):
        assert "there is no key 'nobody'" in run(command, "nobody", status=1).stderr


def test_what_cannot_be_opened_is_told_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENSRACK_KEYS", "mysql://user:secretword@host")
    assert "secretword" not in run("list", status=2).output
    monkeypatch.setenv("LENSRACK_KEYS", "redis://:secretword@127.0.0.1:1/0")
    assert "secretword" not in run("list", status=1).output


def test_keys_are_where_the_jobs_are(home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENSRACK_JOBS", redis_url)
    run("create", "--scope", "admin", "--id", "ops")
    assert not (home / "keys.sqlite").exists()
    assert [one["id"] for one in json.loads(run("list", "--json").output)] == ["ops"]


def test_a_prefix_ends_between_words_unless_told_otherwise(home: Path) -> None:
    """A key for `acme` would see what `acme2` calls its own."""
    said = run("create", "--scope", "predict", "--tasks", "acme", status=2).stderr
    assert "'acme-'" in said
    assert "'acme2-cats'" in said
    assert not (home / "keys.sqlite").exists()
    run("create", "--scope", "predict", "--tasks", "acme", "--open-ended")
    for tasks in ("acme-", "acme_", "acme.eu.", ""):
        run("create", "--scope", "predict", "--tasks", tasks)
    assert [key.open_ended for key in kept(home)] == [True, False, False, False, False]


def test_a_key_that_ends_by_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("create", "--scope", "predict", "--id", "trial", "--days", "30")
    run("create", "--scope", "predict", "--id", "ever")
    trial, ever = sorted(kept(home), key=lambda key: key.id, reverse=True)
    assert trial.expires_at == trial.created_at + 30 * 86_400
    assert ever.expires_at is None
    line = json.loads(
        run("create", "--scope", "predict", "--id", "f", "--days", "1", "--for-file").stdout.splitlines()[1]
    )
    (home / "file").write_text(json.dumps(line))
    ((key, _),) = KeysFile(home / "file").read()
    assert key.expires_at is not None
    assert 0 < key.expires_at - trial.created_at < 86_400 + 60
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 31 * 86_400)
    states = dict(row.split()[:2] for row in run("list").stdout.splitlines())
    assert states == {"trial": "expired", "ever": "predict"}
    assert "expired" in run("rotate", "trial", status=1).stderr
