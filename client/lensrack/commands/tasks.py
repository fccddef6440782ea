"""Tasks, their versions, and where their aliases point."""

from __future__ import annotations

from typing import Annotated

import typer

from lensrack import _terminal as term

from .session import Context, Json, TaskName, VersionName, client_of, show_deleted, wants_json

commands = typer.Typer()
tasks = typer.Typer(help="The tasks there are.")


@tasks.callback(invoke_without_command=True)
def tasks_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_tasks(context, as_json)


@tasks.command("list")
def list_tasks(context: Context, as_json: Json = False) -> None:
    """All tasks."""
    found = client_of(context).tasks.list()
    term.print_json(found) if wants_json(context, as_json) else term.show_tasks(found)


@tasks.command("show")
def show_task(context: Context, task: TaskName, as_json: Json = False) -> None:
    """One task and where its aliases point."""
    found = client_of(context).tasks.get(task)
    term.print_json(found) if wants_json(context, as_json) else term.show_task(found)


@tasks.command("delete")
def delete_task(context: Context, task: TaskName, as_json: Json = False) -> None:
    """Forget a task with all its versions."""
    client_of(context).tasks.delete(task)
    show_deleted(context, "task", task, as_json=as_json)


@commands.command()
def versions(context: Context, task: TaskName, as_json: Json = False) -> None:
    """A task's versions, newest first."""
    found = client_of(context).tasks.versions(task)
    term.print_json(found) if wants_json(context, as_json) else term.show_versions(found)


@commands.command()
def alias(
    context: Context,
    *,
    task: TaskName,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="`live`, or another name.")],
    version: VersionName,
    weight: Annotated[float, typer.Option(help="Share of the requests; the rest stays where it is.")] = 1.0,
    if_match: Annotated[str | None, typer.Option(help="Only if the alias still has this etag.")] = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version; `live` is what `predict TASK` asks."""
    moved = client_of(context).tasks.set_alias(task, name, version, weight=weight, if_match=if_match)
    term.print_json(moved) if wants_json(context, as_json) else term.show_alias(task, moved)


@commands.command()
def rollback(
    context: Context,
    task: TaskName,
    name: Annotated[str, typer.Option("--alias", help="Which alias.")] = "live",
    as_json: Json = False,
) -> None:
    """Point an alias where it pointed before."""
    moved = client_of(context).tasks.rollback(task, name)
    term.print_json(moved) if wants_json(context, as_json) else term.show_alias(task, moved)
