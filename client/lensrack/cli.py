"""`lensrack`: the whole story from a shell.

Answers go to stdout, progress and errors to stderr; with --json, before or after the command, answers are JSON.
Exit codes:
    0    done
    1    it failed: the server refused or broke, a job failed, an image got no answer
    2    the command itself is wrong; nothing was sent
    3    no answer now: the server is away, busy or too slow; the same may work later
    130  interrupted
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import typer

from . import Client, JobHandle, LensrackError, __version__, _asking, _completion, wire
from . import _terminal as term
from ._watch import upload_bar, watch
from .errors import ConnectError, InvalidInput, RequestTimeout, ServerError
from .picture import HEAD, cells, draw, ranked

app = typer.Typer(name="lensrack", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
tasks = typer.Typer(help="The tasks there are.")
bundles = typer.Typer(help="Bundles as files.", no_args_is_help=True)
datasets = typer.Typer(help="Labelled images to train on.")
jobs = typer.Typer(help="Training jobs.")
app.add_typer(tasks, name="tasks")
app.add_typer(bundles, name="bundle")
app.add_typer(datasets, name="datasets")
app.add_typer(jobs, name="jobs")


@dataclass(frozen=True)
class Session:
    """What every command needs."""

    client: Client
    json: bool


Context = typer.Context
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.", autocompletion=_completion.tasks)]
VersionName = Annotated[str, typer.Argument(metavar="VERSION", help="A version, or the unique beginning of it.")]
SourcePath = Annotated[Path, typer.Argument(metavar="PATH", help="A folder, an archive, or - for stdin.")]
DatasetName = Annotated[str | None, typer.Option("--name", help="What people call it.")]
Resume = Annotated[str | None, typer.Option("--resume", metavar="UPLOAD", help="Go on with an upload that broke off.")]
DatasetId = Annotated[
    str, typer.Argument(metavar="DATASET", help="The dataset's id.", autocompletion=_completion.datasets)
]
DatasetOption = Annotated[str, typer.Option("--dataset", help="The dataset's id.", autocompletion=_completion.datasets)]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=_completion.jobs)]


def main() -> None:
    """The console script. Everything that can go wrong ends as one line."""
    try:
        app()
    except (LensrackError, OSError) as error:
        term.print_error(error)
        sys.exit(term.exit_code(error))


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def session(
    context: Context,
    url: Annotated[str | None, typer.Option(envvar="LENSRACK_URL", help="The server.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LENSRACK_API_KEY", help="Its API key.")] = None,
    as_json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train, publish and ask many vision tasks that share one frozen backbone.

    Exit codes: 0 done; 1 it failed; 2 the command is wrong, nothing was sent; 3 the server is away, busy or too slow,
    try again later; 130 interrupted.
    """
    client = Client(url, api_key)
    context.call_on_close(client.close)
    context.obj = Session(client, as_json)


def _client(context: Context) -> Client:
    return cast(Session, context.obj).client


def _wants_json(context: Context, as_json: bool) -> bool:
    return as_json or cast(Session, context.obj).json


@app.command()
def health(context: Context, as_json: Json = False) -> None:
    """Whether the server is ready.

    Exit code 1 where it is not.
    """
    alive, ready = _client(context).health(), _client(context).ready()
    if _wants_json(context, as_json):
        term.print_json(ready)
    else:
        eye = ready.backbone
        backbone = eye and f"{eye.arch} ({'trained' if eye.trained else 'untrained'}) on {eye.device}, {eye.dtype}"
        head: dict[str, object] = {"server": alive.version, "ready": ready.ready, "backbone": backbone}
        term.print_fields({**head, **ready.checks, **{f"note {i}": note for i, note in enumerate(ready.notes, 1)}})
    raise typer.Exit(0 if ready.ready else 1)


# --- tasks, versions, aliases -----------------------------------------------------------------------------------------


@tasks.callback(invoke_without_command=True)
def tasks_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_tasks(context, as_json)


@tasks.command("list")
def list_tasks(context: Context, as_json: Json = False) -> None:
    """All tasks."""
    found = _client(context).tasks.list()
    term.print_json(found) if _wants_json(context, as_json) else term.show_tasks(found)


@tasks.command("show")
def show_task(context: Context, task: TaskName, as_json: Json = False) -> None:
    """One task and where its aliases point."""
    found = _client(context).tasks.get(task)
    term.print_json(found) if _wants_json(context, as_json) else term.show_task(found)


@tasks.command("delete")
def delete_task(context: Context, task: TaskName, as_json: Json = False) -> None:
    """Forget a task with all its versions."""
    _client(context).tasks.delete(task)
    _show_deleted(context, "task", task, as_json=as_json)


def _show_deleted(context: Context, what: str, name: str, *, as_json: bool) -> None:
    if _wants_json(context, as_json):
        term.print_json({"deleted": name})
    else:
        term.say(f"{what} {name} deleted")


@app.command()
def versions(context: Context, task: TaskName, as_json: Json = False) -> None:
    """A task's versions, newest first."""
    found = _client(context).tasks.versions(task)
    term.print_json(found) if _wants_json(context, as_json) else term.show_versions(found)


@app.command()
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
    moved = _client(context).tasks.set_alias(task, name, version, weight=weight, if_match=if_match)
    term.print_json(moved) if _wants_json(context, as_json) else term.show_alias(task, moved)


@app.command()
def rollback(
    context: Context,
    task: TaskName,
    name: Annotated[str, typer.Option("--alias", help="Which alias.")] = "live",
    as_json: Json = False,
) -> None:
    """Point an alias where it pointed before."""
    moved = _client(context).tasks.rollback(task, name)
    term.print_json(moved) if _wants_json(context, as_json) else term.show_alias(task, moved)


@bundles.command("download")
def download(
    context: Context,
    *,
    task: TaskName,
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="Without it, the live one.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Save a bundle; prints the file's name."""
    version = version or _client(context).tasks.get(task).live
    if version is None:
        raise InvalidInput(f"task {task} has no live version: name one of `lensrack versions {task}`")
    data = _client(context).tasks.download(task, version)
    path = output or Path(f"{task}-{version[:12]}.safetensors")
    with path.open("wb" if force else "xb") as file:
        file.write(data)
    if _wants_json(context, as_json):
        term.print_json({"task": task, "version": version, "path": str(path), "bytes": len(data)})
    else:
        print(path)


@bundles.command("upload")
def upload_bundle(
    context: Context,
    task: TaskName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option("--alias", help="An alias to point at it.")] = None,
    as_json: Json = False,
) -> None:
    """Store a bundle; prints its version."""
    stored = _client(context).tasks.upload(task, file, alias=name)
    term.print_json(stored) if _wants_json(context, as_json) else print(stored.version)


@app.command("import")
def import_checkpoint(
    context: Context,
    *,
    task: TaskName,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", exists=True, dir_okay=False, show_default=False)],
    form: Annotated[str, typer.Option("--format", help="vpt, spt, cvpt, peft or timm.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file, a class's name a line.")
    ] = None,
    preprocess: Annotated[str | None, typer.Option(help="JSON: mean, std, interpolation, crop_pct, crop_mode.")] = None,
    name: Annotated[str | None, typer.Option("--alias", help="An alias to point at it.")] = None,
    as_json: Json = False,
) -> None:
    """Store another tool's checkpoint as a version; prints it.

    Official VPT (prompt_ep*.pth and a file with its head), SPT and CVPT, a timm classifier, a LoRA adapter of PEFT
    (adapter_config.json and adapter_model.safetensors). It must have been fitted on the server's backbone.
    """
    words = labels.read_text(encoding="utf-8").splitlines() if labels else None
    stored = _client(context).tasks.import_checkpoint(
        task,
        *files,
        format=cast(wire.ImportFormat, form),
        labels=words,
        preprocess=_object(preprocess) if preprocess else None,
        alias=name,
    )
    told = stored.recipe
    term.say(f"read as {told.get('imported_from')}, {stored.method}; backbone {told.get('backbone')}")
    term.print_json(stored) if _wants_json(context, as_json) else print(stored.version)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InvalidInput(f"--preprocess: expected a JSON object, got {text[:100]}")
    return value


# --- datasets ---------------------------------------------------------------------------------------------------------


@datasets.callback(invoke_without_command=True)
def datasets_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_datasets(context, as_json)


@datasets.command("upload")
def upload_dataset(
    context: Context,
    path: SourcePath,
    name: DatasetName = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Store a folder of class folders; prints its id.

    Also a zip, tar, tar.gz or tar.zst of one, or of pictures and a labels.csv or metadata.jsonl; a parquet file with
    images and labels; an npz like MedMNIST's. Links are not followed, hidden files are left out. What is large is sent
    in pieces and goes on by itself when the connection breaks.
    """
    stored = _sent(path, resume, partial(_client(context).datasets.upload, name=name))
    term.print_json(stored) if _wants_json(context, as_json) else print(stored.id)


@datasets.command("add")
def add_to_dataset(
    context: Context,
    *,
    path: SourcePath,
    parent: Annotated[str, typer.Option(metavar="DATASET", help="The dataset to add to.")],
    name: DatasetName = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Store a dataset's images and those of a folder or archive as a new dataset; prints its id."""
    stored = _sent(path, resume, partial(_client(context).datasets.add, parent=parent, name=name))
    term.print_json(stored) if _wants_json(context, as_json) else print(stored.id)


def _sent(path: Path, resume: str | None, send: Callable[..., wire.Dataset]) -> wire.Dataset:
    """What a folder, an archive or stdin has become; a word about how to go on where it could not be sent whole."""
    source: Path | BinaryIO = sys.stdin.buffer if str(path) == "-" else path
    begun = [resume] if resume else []
    try:
        with upload_bar(path.resolve().name) as progress:
            stored = send(source, progress=progress, resume=resume, on_upload=begun.append)
    except (KeyboardInterrupt, ConnectError, RequestTimeout, ServerError):
        if begun:
            term.say(f"what has arrived is kept for a while: the same command with --resume {begun[-1]} goes on")
        raise
    term.say_uploaded(stored)
    return stored


@datasets.command("from-feedback")
def freeze_feedback(
    context: Context,
    task: TaskName,
    name: DatasetName = None,
    parent: Annotated[str | None, typer.Option(metavar="DATASET", help="Instead of the live version's.")] = None,
    as_json: Json = False,
) -> None:
    """Store what a task was fitted on, corrected and extended by its feedback; prints the dataset's id."""
    stored = _client(context).tasks.freeze_feedback(task, name=name, parent=parent)
    term.say_uploaded(stored)
    term.print_json(stored) if _wants_json(context, as_json) else print(stored.id)


@datasets.command("list")
def list_datasets(context: Context, as_json: Json = False) -> None:
    """All datasets."""
    found = _client(context).datasets.list()
    term.print_json(found) if _wants_json(context, as_json) else term.show_datasets(found)


@datasets.command("show")
def show_dataset(context: Context, dataset: DatasetId, as_json: Json = False) -> None:
    """One dataset and its counts."""
    found = _client(context).datasets.get(dataset)
    term.print_json(found) if _wants_json(context, as_json) else term.show_dataset(found)


@datasets.command("delete")
def delete_dataset(context: Context, dataset: DatasetId, as_json: Json = False) -> None:
    """Forget a dataset."""
    _client(context).datasets.delete(dataset)
    _show_deleted(context, "dataset", dataset, as_json=as_json)


# --- feedback ---------------------------------------------------------------------------------------------------------


@app.command()
def feedback(
    context: Context,
    *,
    task: TaskName,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", exists=True, dir_okay=False, show_default=False)
    ] = None,
    label: Annotated[str | None, typer.Option(help="What the images show.")] = None,
    new_label: Annotated[bool, typer.Option("--new-label", help="The task need not know the label.")] = False,
    withdraw: Annotated[str | None, typer.Option(metavar="SHA256", help="Forget this image's feedback.")] = None,
    as_json: Json = False,
) -> None:
    """Say what images show, or show what has been said about a task.

    `lensrack datasets from-feedback TASK` makes a dataset of it.
    """
    if bool(images) != (label is not None):
        raise InvalidInput("give images and their --label, or neither to see what has been said")
    said: list[dict[str, Any]] = []
    if withdraw is not None:
        _client(context).tasks.delete_feedback(task, withdraw)
        term.say(f"feedback {withdraw} withdrawn")
        said.append({"withdrawn": withdraw})
    for image in images or ():
        [item] = _client(context).feedback(task, image, cast(str, label), new_label=new_label).items
        before = f", before {item.previous}" if item.previous not in (None, item.label) else ""
        term.say(f"{image}: {item.label}{before}")
        said.append({"image": str(image), **item.model_dump()})
    if not images and withdraw is None:
        page = _client(context).tasks.feedback(task)
        term.print_json(page) if _wants_json(context, as_json) else term.show_feedback(page)
    elif _wants_json(context, as_json):
        term.print_json(said)


# --- training ---------------------------------------------------------------------------------------------------------


@app.command()
def train(
    context: Context,
    *,
    task: TaskName,
    dataset: DatasetOption,
    method: Annotated[str, typer.Option(help="auto, vpt_deep, vpt_shallow, linear, ...")] = "auto",
    search: Annotated[str | None, typer.Option(help="auto, quick (a first answer in seconds) or none.")] = None,
    budget: Annotated[int | None, typer.Option(help="Images through the backbone for a search.")] = None,
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
        str | None, typer.Option(help="How prompts begin: uniform, tokens, tokens_mean or tokens_kmeans.")
    ] = None,
    label_smoothing: float | None = None,
    class_weights: Annotated[str | None, typer.Option(help="none or balanced.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, flip or crop.")] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without improvement before it stops; 0: never.")] = None,
    pool: Annotated[str | None, typer.Option(help="The head reads: cls, image or image_and_prompts.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the images held out.")] = None,
    seed: int | None = None,
    condense: Annotated[
        bool | None, typer.Option("--condense", help="Leave out most prompts after the fit.", show_default=False)
    ] = None,
    publish: Annotated[str, typer.Option(help="Go live: always, if_better or never.")] = "always",
    priority: Annotated[int, typer.Option(help="-100 to 100; waiting jobs of higher priority come first.")] = 0,
    follow: Annotated[bool, typer.Option("--watch", help="Stay and show how it goes.")] = False,
    as_json: Json = False,
) -> None:
    """Train a task in the background; prints the job's id.

    What is left out is searched (--search auto), or takes the method's default (--search none). Without --search,
    a method that is named together with hyper-parameters is fitted with these.
    """
    given = {name: context.params[name] for name in wire.Recipe.model_fields}
    recipe = {name: value for name, value in given.items() if value is not None}
    policy = cast(wire.PublishPolicy, publish)  # another word is refused before anything is sent
    asked: Mapping[str, Any] = recipe or {"search": "auto"}
    handle = _client(context).train(task, dataset, method, asked, publish=policy, priority=priority)
    _show_begun(handle, follow=follow, as_json=_wants_json(context, as_json))


@app.command()
def condense(
    context: Context,
    *,
    task: TaskName,
    version: Annotated[str, typer.Option(help="A version, the beginning of one, or an alias.")] = "live",
    dataset: Annotated[str | None, typer.Option(help="Instead of the version's own.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="A share of the prompts to try; repeat for more.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Validation accuracy that may be lost, such as 0.005.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of the refit of each share.")] = None,
    publish: Annotated[str, typer.Option(help="Go live: always, if_better or never.")] = "always",
    priority: Annotated[int, typer.Option(help="-100 to 100; waiting jobs of higher priority come first.")] = 0,
    follow: Annotated[bool, typer.Option("--watch", help="Stay and show how it goes.")] = False,
    as_json: Json = False,
) -> None:
    """Leave out most prompts of a version in the background; prints the job's id.

    The smallest share that costs no more than --epsilon becomes a new version; where none does, nothing changes.
    """
    handle = _client(context).condense(
        task,
        version,
        dataset=dataset,
        keep=keep or None,
        epsilon=epsilon,
        epochs=epochs,
        publish=cast(wire.PublishPolicy, publish),
        priority=priority,
    )
    _show_begun(handle, follow=follow, as_json=_wants_json(context, as_json))


def _show_begun(handle: JobHandle, *, follow: bool, as_json: bool) -> None:
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
        term.say(f"job {handle.id} goes on: `lensrack jobs watch {handle.id}` or `lensrack jobs cancel {handle.id}`")
        raise typer.Exit(130) from None


def _follow(handle: JobHandle) -> None:
    job = _watch(handle)
    if job.version is None:
        term.say(f"job {job.id} {job.state}: {job.method} leaves no version; `lensrack jobs show {job.id}`")
        return
    term.say(f"job {job.id} {job.state}: task {job.task} has version {job.version}")
    told = job.metrics.get("condense") or {}
    if told.get("kept"):
        term.say(f"it keeps {told['kept']} of {told['prompts']} prompts")
    elif told:
        term.say("no smaller share of its prompts was good enough: all of them are kept")
    if job.metrics.get("published") is False and (told.get("kept") or not told.get("version")):
        term.say(f"it is not live: the job's --publish was {job.publish}")


@app.command()
def compare(
    context: Context,
    *,
    task: TaskName,
    dataset: DatasetOption,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="A method or a baseline; repeatable. Default: all methods.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable. Default: 0, 1 and 2.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of every fit but heads alone.")] = None,
    batch_size: int | None = None,
    prompts: Annotated[int | None, typer.Option(help="Learned tokens per layer.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the images held out.")] = None,
    priority: Annotated[int, typer.Option(help="-100 to 100; waiting jobs of higher priority come first.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and leave.")] = False,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to draw; needs lensrack[plot].")] = None,
    as_json: Json = False,
) -> None:
    """Fit several methods on a dataset and show what each reaches and costs. Nothing is stored.

    `lensrack comparison JOB` shows the table again, or of a job that was started with --detach.
    """
    given = {"epochs": epochs, "batch_size": batch_size, "prompts": prompts, "validation": validation}
    recipe = {name: value for name, value in given.items() if value is not None}
    handle = _client(context).compare(
        task, dataset, methods, seeds=seeds or (0, 1, 2), recipe=recipe, priority=priority
    )
    if detach:
        term.print_json(handle.job) if _wants_json(context, as_json) else print(handle.id)
        return
    term.say(f"job {handle.id}")
    _watch(handle)
    _show_comparison(context, handle.id, picture, as_json=as_json)


@app.command()
def comparison(
    context: Context,
    job: JobId,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to draw; needs lensrack[plot].")] = None,
    as_json: Json = False,
) -> None:
    """The table of a comparison that has ended."""
    _show_comparison(context, job, picture, as_json=as_json)


def _show_comparison(context: Context, job: str, picture: Path | None, *, as_json: bool) -> None:
    found = _client(context).comparison(job)
    if picture is not None:
        picture.write_text(draw([found]))
    if _wants_json(context, as_json):
        term.print_json(found)
    else:
        rows = [cells(found, row) for row in ranked(found)]
        term.print_table(HEAD, rows, f"job {job} is {found.state}: there is no table yet")


@jobs.callback(invoke_without_command=True)
def jobs_or_list(context: Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_jobs(context, as_json=as_json)


@jobs.command("list")
def list_jobs(
    context: Context,
    task: Annotated[str | None, typer.Option(help="Of this task only.")] = None,
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 50,
    as_json: Json = False,
) -> None:
    """Jobs, newest first."""
    page = _client(context).jobs.list(task=task, state=cast(wire.JobState, state), limit=limit)
    term.print_json(page.jobs) if _wants_json(context, as_json) else term.show_jobs(page.jobs)
    if page.next:
        term.say(f"these are the newest {limit}; --limit shows more")


@jobs.command("show")
def show_job(context: Context, job: JobId, as_json: Json = False) -> None:
    """One job."""
    found = _client(context).jobs.get(job)
    term.print_json(found) if _wants_json(context, as_json) else term.show_job(found)


@jobs.command("watch")
def watch_job(context: Context, job: JobId, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 1 where it fails."""
    handle = _client(context).jobs.handle(job)
    _follow(handle)
    if _wants_json(context, as_json):
        term.print_json(handle.job)


@jobs.command("cancel")
def cancel_job(context: Context, job: JobId, as_json: Json = False) -> None:
    """End a job: a waiting one at once, a running one within a step."""
    asked = _client(context).jobs.cancel(job)
    if _wants_json(context, as_json):
        term.print_json(asked)
    term.say(f"job {job} is cancelled" if asked.finished else f"job {job} will end within a step")


# --- predictions ------------------------------------------------------------------------------------------------------


@app.command()
def predict(
    context: Context,
    *,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="A task, optionally @alias, @version or @several+together.",
            autocompletion=_completion.tasks,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", exists=True, help="Images, or folders of them.")],
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Labels for each image, best first.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="A file to write, a row an image, as the answers come.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a CSV that broke off.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a CSV that is there.")] = False,
    in_flight: Annotated[int, typer.Option(min=1, max=100, help="Images that are asked about at once.")] = 8,
    client_resize: Annotated[
        bool, typer.Option("--client-resize", help="Cut images to the model's size before they are sent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a task about images, or about all that are in folders.

    Exit code 1 where one of them got no answer. With --csv a run that broke off is gone on with by --resume: images
    that have their row are not asked about again, those that got no answer are.
    """
    client = _client(context).with_options(client_resize=client_resize)
    question = _asking.Question(client, task, top_k, in_flight, _wants_json(context, as_json))
    if csv is not None:
        _asking.to_csv(question, images, csv, resume=resume, force=force)
    elif resume or force:
        raise InvalidInput("--resume and --force are for a file: expected --csv FILE")
    else:
        _asking.to_terminal(question, images)


if __name__ == "__main__":
    main()
