"""Commands for tasks, their versions and aliases."""

from __future__ import annotations

from typing import Annotated

import typer

from lensrack import _terminal as term

from .session import Context, Json, TaskName, VersionName, client_of, require_consent, show_deleted, wants_json

commands = typer.Typer()
tasks = typer.Typer(help="Tasks on the server.")


@tasks.callback(invoke_without_command=True)
def tasks_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_tasks(context, as_json)


@tasks.command("list")
def list_tasks(context: Context, as_json: Json = False) -> None:
    """List all tasks."""
    stored = client_of(context).tasks.list()
    term.print_json(stored) if wants_json(context, as_json) else term.show_tasks(stored)


@tasks.command("show")
def show_task(context: Context, task: TaskName, as_json: Json = False) -> None:
    """Show one task with its aliases."""
    stored = client_of(context).tasks.get(task)
    term.print_json(stored) if wants_json(context, as_json) else term.show_task(stored)


@tasks.command("delete")
def delete_task(
    context: Context,
    task: TaskName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a task with all its versions, aliases and feedback, after asking."""
    if not yes:
        stored = client_of(context).tasks.get(task)
        require_consent(f"delete task {task} with its {stored.versions} versions, aliases and feedback?")
    client_of(context).tasks.delete(task)
    show_deleted(context, "task", task, as_json=as_json)


@commands.command()
def versions(context: Context, task: TaskName, as_json: Json = False) -> None:
    """List a task's versions, newest first, and which of them the aliases point at."""
    stored = client_of(context).tasks.versions(task)
    if wants_json(context, as_json):
        term.print_json(stored)
    else:
        term.show_versions(stored, client_of(context).tasks.get(task).aliases)


@commands.command()
def alias(
    context: Context,
    *,
    task: TaskName,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="`live`, or another name.")],
    version: VersionName,
    weight: Annotated[float, typer.Option(help="Share of the requests; the rest keeps its present version.")] = 1.0,
    if_match: Annotated[str | None, typer.Option(help="Only if the alias still has this etag.")] = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version; `predict TASK` uses the alias `live`."""
    moved = client_of(context).tasks.set_alias(task, name, version, weight=weight, if_match=if_match)
    term.print_json(moved) if wants_json(context, as_json) else term.show_alias(task, moved)


@commands.command()
def rollback(
    context: Context,
    task: TaskName,
    name: Annotated[str, typer.Option("--alias", help="The alias.")] = "live",
    as_json: Json = False,
) -> None:
    """Restore an alias' previous version; prints both."""
    before = client_of(context).tasks.alias(task, name)
    moved = client_of(context).tasks.rollback(task, name)
    if wants_json(context, as_json):
        term.print_json(moved)
    else:
        term.say(f"{name} of {task}: from {term.targets(before)} back to {term.targets(moved)}")
        term.show_alias(task, moved)
