"""Commands for training jobs: fit, condense, compare, and follow them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lensrack import JobHandle, wire
from lensrack import _terminal as term
from lensrack._job_text import accuracy_text, judged_text, outcome_text, progress_text, ranking_text, trial_table
from lensrack._progress import watch
from lensrack.picture import HEAD, cells, draw, ranked

from .session import Context, DatasetOption, JobId, Json, TaskName, client_of, wants_json

commands = typer.Typer()
jobs = typer.Typer(help="Training jobs.")


@commands.command()
def train(
    context: Context,
    *,
    task: TaskName,
    dataset: DatasetOption,
    method: Annotated[str, typer.Option(help="auto, vpt_deep, vpt_shallow, linear, ...")] = "auto",
    search: Annotated[str | None, typer.Option(help="auto, quick (a first answer in seconds) or none.")] = None,
    budget: Annotated[int | None, typer.Option(help="Forward passes of images that a search may use.")] = None,
    preset: Annotated[str | None, typer.Option(help="A published recipe: vpt or cvpt.")] = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate itself.")] = None,
    base_lr: Annotated[float | None, typer.Option(help="lr = base_lr * batch_size / 256.")] = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    prompts: Annotated[int | None, typer.Option(help="Learned tokens per layer.")] = None,
    prompt_layers: Annotated[
        tuple[int, int] | None, typer.Option(help="First and last layer with prompts, from 0.")
    ] = None,
    prompt_dropout: float | None = None,
    init: Annotated[
        str | None, typer.Option(help="Initial prompts: uniform, tokens, tokens_mean or tokens_kmeans.")
    ] = None,
    label_smoothing: float | None = None,
    class_weights: Annotated[str | None, typer.Option(help="none or balanced.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, flip or crop.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without improvement; 0: never.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="The head reads: cls, image or image_and_prompts.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the images held out.")] = None,
    seed: int | None = None,
    condense: Annotated[
        bool | None, typer.Option("--condense", help="Remove most prompts after the fit.", show_default=False)
    ] = None,
    publish: Annotated[str, typer.Option(help="Whether the version goes live: always, if_better or never.")] = "always",
    priority: Annotated[int, typer.Option(help="-100 to 100; waiting jobs of higher priority run first.")] = 0,
    follow: Annotated[bool, typer.Option("--watch", help="Wait and show the progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a task in the background; prints the job's id.

    Hyper-parameters that are not given are searched (--search auto) or take the method's defaults (--search none).
    Without --search, a method given together with hyper-parameters is fitted with these.
    """
    options = {name: context.params[name] for name in wire.Recipe.model_fields}
    recipe: Mapping[str, Any] = {name: value for name, value in options.items() if value is not None}
    policy = cast(wire.PublishPolicy, publish)  # the client refuses any other word
    handle = client_of(context).train(
        task, dataset, method, recipe or {"search": "auto"}, publish=policy, priority=priority
    )
    _show_started(handle, follow=follow, as_json=wants_json(context, as_json))


@commands.command()
def condense(
    context: Context,
    *,
    task: TaskName,
    version: Annotated[str, typer.Option(help="A version, a prefix of one, or an alias.")] = "live",
    dataset: Annotated[str | None, typer.Option(help="Default: the version's own dataset.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="A share of the prompts to try; repeatable.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Validation accuracy that may be lost, such as 0.005.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each refit.")] = None,
    publish: Annotated[str, typer.Option(help="Whether the version goes live: always, if_better or never.")] = "always",
    priority: Annotated[int, typer.Option(help="-100 to 100; waiting jobs of higher priority run first.")] = 0,
    follow: Annotated[bool, typer.Option("--watch", help="Wait and show the progress.")] = False,
    as_json: Json = False,
) -> None:
    """Remove most prompts of a version in the background; prints the job's id.

    The smallest share that loses at most --epsilon becomes a new version; if all lose more, nothing changes.
    """
    handle = client_of(context).condense(
        task,
        version,
        dataset=dataset,
        keep=keep or None,
        epsilon=epsilon,
        epochs=epochs,
        publish=cast(wire.PublishPolicy, publish),
        priority=priority,
    )
    _show_started(handle, follow=follow, as_json=wants_json(context, as_json))


def _show_started(handle: JobHandle, *, follow: bool, as_json: bool) -> None:
    if not as_json:
        print(handle.id, flush=True)
    if follow:
        _follow(handle)
    if as_json:
        term.print_json(handle.job)


def _watch(handle: JobHandle) -> wire.Job:
    try:
        return watch(handle)
    except KeyboardInterrupt:
        term.say(f"job {handle.id} continues: `lensrack jobs watch {handle.id}` or `lensrack jobs cancel {handle.id}`")
        raise typer.Exit(130) from None


def _follow(handle: JobHandle) -> None:
    job = _watch(handle)
    if job.version is None:
        term.say(f"job {job.id} {job.state}: {job.method} makes no version; see `lensrack jobs show {job.id}`")
        return
    condensed = job.metrics.get("condense") or {}
    if condensed.get("kept"):
        term.say(f"it keeps {condensed['kept']} of {condensed['prompts']} prompts")
    elif condensed:
        term.say("no smaller share of its prompts was good enough: all of them are kept")
    if job.metrics.get("published") is False and (condensed.get("kept") or not condensed.get("version")):
        judged = judged_text(job.metrics.get("judged") or {})
        term.say(f"it is not live: the job's --publish was {job.publish}{f', {judged}' if judged else ''}")
    term.say(outcome_text(job))


@commands.command()
def compare(
    context: Context,
    *,
    task: TaskName,
    dataset: DatasetOption,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="A method or a baseline; repeatable. Default: all methods.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable. Default: 0, 1 and 2.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every fit, except of heads alone.")] = None,
    batch_size: int | None = None,
    prompts: Annotated[int | None, typer.Option(help="Learned tokens per layer.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the images held out.")] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; waiting jobs of higher priority run first.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and do not wait.")] = False,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to draw; needs lensrack[plot].")] = None,
    as_json: Json = False,
) -> None:
    """Fit several methods on a dataset and show their accuracy and cost. Nothing is stored.

    `lensrack comparison JOB` shows the table again, or the table of a job started with --detach.
    """
    options = {"epochs": epochs, "batch_size": batch_size, "prompts": prompts, "validation": validation}
    recipe = {name: value for name, value in options.items() if value is not None}
    handle = client_of(context).compare(
        task, dataset, methods, seeds=seeds or (0, 1, 2), recipe=recipe, priority=priority
    )
    if detach:
        term.print_json(handle.job) if wants_json(context, as_json) else print(handle.id)
        return
    term.say(f"job {handle.id}")
    _watch(handle)
    _show_comparison(context, handle.id, picture, as_json=as_json)


@commands.command()
def comparison(
    context: Context,
    job: JobId,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to draw; needs lensrack[plot].")] = None,
    as_json: Json = False,
) -> None:
    """Show the table of a comparison that has ended."""
    _show_comparison(context, job, picture, as_json=as_json)


def _show_comparison(context: Context, job: str, picture: Path | None, *, as_json: bool) -> None:
    table = client_of(context).comparison(job)
    if picture is not None:
        picture.write_text(draw([table]))
    if wants_json(context, as_json):
        term.print_json(table)
    else:
        rows = [cells(table, row) for row in ranked(table)]
        term.print_table(HEAD, rows, f"job {job} is {table.state}: there is no table yet")


@jobs.callback(invoke_without_command=True)
def jobs_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_jobs(context, as_json=as_json)


@jobs.command("list")
def list_jobs(
    context: Context,
    task: Annotated[str | None, typer.Option(help="Only jobs of this task.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Only jobs in this state: queued, running, succeeded, failed or cancelled.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 50,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    page = client_of(context).jobs.list(task=task, state=cast(wire.JobState, state), limit=limit)
    term.print_json(page.jobs) if wants_json(context, as_json) else term.show_jobs(page.jobs)
    if page.next:
        term.say(f"these are the newest {limit}; --limit shows more")


@jobs.command("show")
def show_job(context: Context, job: JobId, as_json: Json = False) -> None:
    """Show one job, with the trials of its search."""
    stored = client_of(context).jobs.get(job)
    if wants_json(context, as_json):
        term.print_json(stored)
        return
    term.show_job(stored)
    if not stored.finished:
        term.say(progress_text(stored.progress))
    for text in filter(None, (accuracy_text(stored.metrics), accuracy_text(stored.metrics, "test"))):
        term.say(text)
    if trials := (stored.metrics.get("search") or {}).get("trials"):
        term.print_table(*trial_table(trials, stored.metrics["search"].get("chosen")), "no trials")
        term.say(ranking_text(trials))


@jobs.command("watch")
def watch_job(context: Context, job: JobId, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 1 if it fails."""
    handle = client_of(context).jobs.handle(job)
    _follow(handle)
    if wants_json(context, as_json):
        term.print_json(handle.job)


@jobs.command("cancel")
def cancel_job(context: Context, job: JobId, as_json: Json = False) -> None:
    """Cancel a job: a waiting job ends at once, a running one within a training step."""
    cancelled = client_of(context).jobs.cancel(job)
    if wants_json(context, as_json):
        term.print_json(cancelled)
    term.say(f"job {job} is cancelled" if cancelled.finished else f"job {job} will end within a step")
