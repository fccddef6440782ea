"""`python -m server keys create | list | revoke | rotate`: a token is told once, at its making, and kept as a hash."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from server.errors import ServiceError
from server.keys import key as keys
from server.keys.key import Key
from server.keys.store import KeyStore
from server.keys.url import open_keys
from server.settings import Settings

cli = typer.Typer(no_args_is_help=True, help="API keys: who may ask the server what.")

DAY_S = 86_400.0
ONCE = "this is the only time that the token is shown"

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]


@dataclass(frozen=True)
class _Opened:
    store: KeyStore
    now: float


@cli.command()
def create(
    *,
    scope: Annotated[list[str], typer.Option(help="predict, train or admin, which includes both; repeatable.")],
    tasks: Annotated[
        str, typer.Option(help="The beginning of the names of its tasks, up to a -, _ or dot. Empty: all tasks.")
    ] = "",
    open_ended: Annotated[
        bool, typer.Option("--open-ended", help="Take --tasks as it is: `a` then covers `ab-cats`, too.")
    ] = False,
    name: Annotated[str, typer.Option(help="What people call it.")] = "",
    key_id: Annotated[str | None, typer.Option("--id", help="Its public id; one is made up otherwise.")] = None,
    images_per_s: Annotated[float | None, typer.Option(help="Most images a second, over a minute.")] = None,
    jobs_per_day: Annotated[int | None, typer.Option(help="Most training jobs in 24 hours.")] = None,
    bytes_stored: Annotated[int | None, typer.Option(help="Most bytes of data sets.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its tenant's share of a busy server beside other tenants', 1 without.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0.001, max=36_500, help="Days until it ends by itself; for ever without.")
    ] = None,
    for_file: Annotated[
        bool,
        typer.Option(help="Store nothing; a second line tells what goes into LENSRACK_KEYS_FILE."),
    ] = False,
) -> None:
    """Make a key and tell its token."""
    allowance = {
        "images_per_s": images_per_s,
        "jobs_per_day": jobs_per_day,
        "bytes_stored": bytes_stored,
        "weight": weight,
    }
    made = {"id": key_id or keys.new_id(), "name": name, "scopes": scope, "tasks": tasks, "allowance": allowance}
    now = time.time()
    key = _checked(made | {"created_at": now, "expires_at": None if days is None else now + days * DAY_S})
    if key.open_ended and not open_ended:
        expected = f"expected it to end in one of {' '.join(keys.SEPARATORS)}, as {tasks + '-'!r} does"
        typer.echo(f"tasks: {expected}; {tasks!r} would cover {tasks + '2-cats'!r}, too (--open-ended)", err=True)
        raise typer.Exit(2)
    token = keys.new_token(key.id)
    key = key.model_copy(update={"hash": keys.hashed(token)})
    if for_file:
        typer.echo(token)
        typer.echo(_line(key))
        return
    with _keys() as opened:
        opened.store.add(key)
    typer.echo(f"key {key.id}; {ONCE}", err=True)
    typer.echo(token)


@cli.command("list")
def list_keys(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """All keys, without what proves them. Those of LENSRACK_KEYS_FILE are in that file."""
    with _keys() as opened:
        told = [{**_told(key), "ended": key.ended(opened.now)} for key in opened.store.list()]
    if as_json:
        typer.echo(json.dumps(told))
        return
    for one in told:
        state = "revoked" if one["revoked_at"] else "expired" if one["ended"] else "+".join(one["scopes"])
        typer.echo(f"{one['id']:<16} {state:<20} {one['tasks'] + '*':<20} {one['name']}")


@cli.command()
def revoke(key_id: KeyId) -> None:
    """End a key. Running servers know within a second or two."""
    with _keys() as opened:
        opened.store.change(key_id, lambda key: key.model_copy(update={"revoked_at": key.revoked_at or opened.now}))
    typer.echo(f"key {key_id} is revoked", err=True)


@cli.command()
def rotate(
    key_id: KeyId,
    keep_s: Annotated[float, typer.Option(min=0, help="How long the old token holds as well, in seconds.")] = 0.0,
) -> None:
    """Give a key a new token and tell it."""
    token = keys.new_token(key_id)
    new_hash = keys.hashed(token)
    with _keys() as opened:

        def renewed(key: Key) -> Key:
            if key.ended(opened.now):
                why = "revoked" if key.revoked_at is not None else "expired"
                typer.echo(f"key {key_id} is {why}: make a new one", err=True)
                raise typer.Exit(1)
            old = {"old_hash": key.hash, "old_until": opened.now + keep_s} if keep_s else {"old_hash": ""}
            return key.model_copy(update={"hash": new_hash, **old})

        opened.store.change(key_id, renewed)
    typer.echo(f"key {key_id} has a new token; {ONCE}", err=True)
    typer.echo(token)


def _checked(made: dict[str, Any]) -> Key:
    try:
        return Key.model_validate(made)
    except ValidationError as error:
        for problem in error.errors():
            typer.echo(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}", err=True)
        raise typer.Exit(2) from None


def _told(key: Key) -> dict[str, Any]:
    kept = key.model_dump(mode="json", exclude={"hash", "old_hash"})
    return {**kept, "scopes": [scope for scope in keys.SCOPES if scope in key.scopes]}


def _line(key: Key) -> str:
    limits = key.allowance.model_dump(exclude_none=True)
    known: dict[str, Any] = {"id": key.id, "name": key.name, "scopes": sorted(key.scopes), "tasks": key.tasks}
    if key.expires_at is not None:
        known["expires_at"] = datetime.fromtimestamp(key.expires_at, UTC).isoformat()
    return json.dumps({**known, **limits, "hash": key.hash})


@contextmanager
def _keys() -> Iterator[_Opened]:
    """The key store, closed afterwards; a failure is a sentence."""
    try:
        store = open_keys(Settings().keys_url)
    except ValueError as error:  # a wrong setting, too
        typer.echo(f"the keys cannot be opened: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        yield _Opened(store, time.time())
    except ServiceError as error:
        typer.echo(f"nothing was changed: {error.detail}", err=True)
        raise typer.Exit(1) from None
    finally:
        store.close()
