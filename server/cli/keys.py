"""`python -m server keys create | list | revoke | rotate`: a token is printed once, and stored as a hash."""

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

cli = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke, rotate.")

DAY_S = 86_400.0
ONCE = "the token is shown only this once"

KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]


@dataclass(frozen=True)
class _OpenStore:
    store: KeyStore
    now: float


@cli.command()
def create(
    *,
    scope: Annotated[list[str], typer.Option(help="predict, train or admin, which includes both; repeatable.")],
    tasks: Annotated[
        str,
        typer.Option(help="Prefix of the key's task names, ending in -, _ or a dot. Empty: all tasks."),
    ] = "",
    open_ended: Annotated[
        bool, typer.Option("--open-ended", help="Allow --tasks without such an ending: `a` then covers `ab-cats` too.")
    ] = False,
    name: Annotated[str, typer.Option(help="Name for display.")] = "",
    key_id: Annotated[str | None, typer.Option("--id", help="Public id; random by default.")] = None,
    images_per_s: Annotated[float | None, typer.Option(help="Most images a second, averaged over a minute.")] = None,
    jobs_per_day: Annotated[int | None, typer.Option(help="Most training jobs in 24 hours.")] = None,
    bytes_stored: Annotated[int | None, typer.Option(help="Most bytes of datasets stored.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="The tenant's share of a busy server, relative to other tenants; default 1.")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0.001, max=36_500, help="Days until the key expires; default: never.")
    ] = None,
    for_file: Annotated[
        bool,
        typer.Option(help="Store nothing; print a second line for LENSRACK_KEYS_FILE."),
    ] = False,
) -> None:
    """Create a key and print its token."""
    allowance = {
        "images_per_s": images_per_s,
        "jobs_per_day": jobs_per_day,
        "bytes_stored": bytes_stored,
        "weight": weight,
    }
    fields = {"id": key_id or keys.new_id(), "name": name, "scopes": scope, "tasks": tasks, "allowance": allowance}
    now = time.time()
    key = _validate(fields | {"created_at": now, "expires_at": None if days is None else now + days * DAY_S})
    if key.open_ended and not open_ended:
        expected = f"expected it to end in one of {' '.join(keys.SEPARATORS)}, as {tasks + '-'!r} does"
        typer.echo(f"tasks: {expected}; {tasks!r} would cover {tasks + '2-cats'!r}, too (--open-ended)", err=True)
        raise typer.Exit(2)
    token = keys.new_token(key.id)
    key = key.model_copy(update={"hash": keys.hashed(token)})
    if for_file:
        typer.echo(token)
        typer.echo(_file_line(key))
        return
    with _keys() as opened:
        opened.store.add(key)
    typer.echo(f"key {key.id}; {ONCE}", err=True)
    typer.echo(token)


@cli.command("list")
def list_keys(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the stored keys, without tokens. Keys of LENSRACK_KEYS_FILE are not listed."""
    with _keys() as opened:
        rows = [{**_row(key), "ended": key.ended(opened.now)} for key in opened.store.list()]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        state = "revoked" if row["revoked_at"] else "expired" if row["ended"] else "+".join(row["scopes"])
        typer.echo(f"{row['id']:<16} {state:<20} {row['tasks'] + '*':<20} {row['name']}")


@cli.command()
def revoke(key_id: KeyId) -> None:
    """Revoke a key. Running servers notice within two seconds."""
    with _keys() as opened:
        opened.store.change(key_id, lambda key: key.model_copy(update={"revoked_at": key.revoked_at or opened.now}))
    typer.echo(f"key {key_id} is revoked", err=True)


@cli.command()
def rotate(
    key_id: KeyId,
    keep_s: Annotated[float, typer.Option(min=0, help="Seconds for which the old token stays valid.")] = 0.0,
) -> None:
    """Give a key a new token and print it."""
    token = keys.new_token(key_id)
    new_hash = keys.hashed(token)
    with _keys() as opened:

        def renew(key: Key) -> Key:
            if key.ended(opened.now):
                state = "revoked" if key.revoked_at is not None else "expired"
                typer.echo(f"key {key_id} is {state}; create a new one", err=True)
                raise typer.Exit(1)
            old = {"old_hash": key.hash, "old_until": opened.now + keep_s} if keep_s else {"old_hash": ""}
            return key.model_copy(update={"hash": new_hash, **old})

        opened.store.change(key_id, renew)
    typer.echo(f"key {key_id} has a new token; {ONCE}", err=True)
    typer.echo(token)


def _validate(fields: dict[str, Any]) -> Key:
    try:
        return Key.model_validate(fields)
    except ValidationError as error:
        for problem in error.errors():
            typer.echo(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}", err=True)
        raise typer.Exit(2) from None


def _row(key: Key) -> dict[str, Any]:
    fields = key.model_dump(mode="json", exclude={"hash", "old_hash"})
    return {**fields, "scopes": [scope for scope in keys.SCOPES if scope in key.scopes]}


def _file_line(key: Key) -> str:
    limits = key.allowance.model_dump(exclude_none=True)
    fields: dict[str, Any] = {"id": key.id, "name": key.name, "scopes": sorted(key.scopes), "tasks": key.tasks}
    if key.expires_at is not None:
        fields["expires_at"] = datetime.fromtimestamp(key.expires_at, UTC).isoformat()
    return json.dumps({**fields, **limits, "hash": key.hash})


@contextmanager
def _keys() -> Iterator[_OpenStore]:
    """The key store, closed at the end. A failure is printed, with exit status 1 or 2."""
    try:
        store = open_keys(Settings().keys_url)
    except ValueError as error:  # an invalid setting too
        typer.echo(f"the keys cannot be opened: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        yield _OpenStore(store, time.time())
    except ServiceError as error:
        typer.echo(f"nothing was changed: {error.detail}", err=True)
        raise typer.Exit(1) from None
    finally:
        store.close()
