"""`python -m server serve | work | keys | import | export | store | sample | pretrain | bench` and their like."""

from __future__ import annotations

import os

# Before torch, which reads them once. Idle threads must not spin beside a worker's. The code that oneDNN makes for each
# shape that it multiplies is large; two caches would keep that of 1,024, oneDNN's and that of ideep, by which PyTorch
# calls it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")

import atexit
import importlib
import json
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
from prometheus_client import start_http_server
from pydantic import ValidationError

from prompts_store import Store, StoreError, VersionNotFound, open_store
from server import __version__, allocator, key_commands, logs, metrics, tracing
from server.lean_timm import import_timm
from server.settings import Settings

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
log = logging.getLogger("server")

ExportFormat = Literal["onnx", "timm"]
ExportInput = Literal["uint8", "float"]
BENCHES = (
    "accuracy",
    "backbone",
    "compare",
    "decode",
    "engine",
    "http",
    "jobs",
    "ladder",
    "noisy",
    "overhead",
    "overload",
    "precision",
    "prompts",
    "rack",
    "readers",
    "swap",
    "train",
    "training-load",
)  # modules of `server.bench`


def load_settings(**overrides: Any) -> Settings:
    """The environment's settings with the command line's on top; a wrong one is a sentence, not a traceback."""
    try:
        return Settings(**{key: value for key, value in overrides.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            typer.echo(f"LENSRACK_{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}", err=True)
        raise typer.Exit(2) from None


def start_logging(settings: Settings) -> None:
    logs.start(settings.log_level, settings.log_format)


def start_telling(settings: Settings, service: str) -> None:
    """Logs, and traces where they are wanted; a trace names this `service`."""
    start_logging(settings)
    require_tracing(settings)
    if settings.otlp_endpoint:
        tracing.start(settings.otlp_endpoint, service=service, version=__version__, ratio=settings.trace_ratio)
        atexit.register(tracing.stop)  # whatever has not been sent


def require_tracing(settings: Settings) -> None:
    """Where traces are wanted and cannot be had, a sentence and not a traceback."""
    try:
        if settings.otlp_endpoint:
            tracing.require()
    except tracing.NotInstalled as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (LENSRACK_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one (LENSRACK_PORT).")] = None,
) -> None:
    """Serve predictions and take training jobs."""
    allocator.keep_one_heap()
    settings = load_settings(host=host, port=port)
    if settings.fronts:
        start_logging(settings)
        require_tracing(settings)  # each process traces for itself
    else:
        start_telling(settings, "lensrack-server")
    import_timm(hub=settings.downloads_weights)
    from server.engine.backbone import BackboneError
    from server.errors import ServiceError

    try:
        if settings.fronts:
            from server.house import House

            status = House(settings).run()
        else:
            from server import serving

            status = serving.run(partial(_serve, settings))
            serving.wait_for_threads(status)
    except (BackboneError, StoreError, ServiceError, ValueError, OSError) as error:
        typer.echo(f"the server cannot start: {error}", err=True)
        raise typer.Exit(1) from None
    if status:
        raise typer.Exit(status)


async def _serve(settings: Settings) -> int:
    """All in this process. The exit status."""
    from server import serving
    from server.bootstrap import build_server
    from server.watchdog import EXIT_CODE

    listener = serving.listen(settings)
    server = build_server(settings)

    def ready(front: serving.Front) -> None:
        log.info("serving on http://%s:%d", *listener.getsockname()[:2])
        server.room.watchdog.on_lost = lambda: setattr(front, "should_exit", True)

    await serving.serve_http(server, listener, ready)
    return EXIT_CODE if server.room.lost else 0


@cli.command()
def work(
    until_stdin_closes: Annotated[
        bool, typer.Option(help="Leave when the process that started this one ends.")
    ] = False,
) -> None:
    """Fit queued training jobs, one after the other."""
    allocator.keep_one_heap()
    settings = load_settings()
    start_telling(settings, "lensrack-worker")
    from server.engine.backbone import BackboneError
    from server.errors import ServiceError
    from server.worker import build_worker

    os.nice(settings.worker_nice)
    try:
        trainer = build_worker(settings, name=f"{socket.gethostname()}-{os.getpid()}")
        if settings.worker_metrics_port:
            start_http_server(settings.worker_metrics_port, settings.worker_metrics_host, metrics.REGISTRY)
    except (BackboneError, StoreError, ServiceError, ValueError, OSError) as error:
        typer.echo(f"the worker cannot start: {error}", err=True)
        raise typer.Exit(1) from None

    def leave(_signal: int, _frame: FrameType | None) -> None:
        trainer.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    if until_stdin_closes:
        threading.Thread(target=_wait_for_parent, args=(trainer.stop,), daemon=True).start()
    log.info("worker ready, pid %d", os.getpid())
    trainer.run()


def _wait_for_parent(stop: threading.Event) -> None:
    """The pipe on stdin closes when the server ends, however it ends."""
    while os.read(0, 1024):
        pass
    stop.set()


@cli.command()
def sample(folder: Annotated[Path, typer.Argument(help="Where to draw: FOLDER/fruit and FOLDER/weather.")]) -> None:
    """Draw two small labelled picture sets to try things out with."""
    from server.samples import draw

    draw(folder)
    typer.echo(f"drew {folder}/fruit and {folder}/weather: class folders under train/ and test/")


@cli.command()
def sample_tasks() -> None:
    """Fit the tasks that come with the bundled backbone anew, from pictures that Python packages ship."""
    start_logging(load_settings())
    from server.sample_making import make

    for task, accuracy in make().items():
        typer.echo(f"{task}: test accuracy {accuracy:.3f}")


cli.add_typer(key_commands.cli, name="keys")


@cli.command()
def backbones() -> None:
    """List the ViT families of timm that can be served, and why the others cannot."""
    from server.engine.architectures import architectures, table

    found = list(architectures())
    served = sum(one.refusal is None for one in found)
    typer.echo(table(found) + f"\n{served} of {len(found)} architectures are served.")


@cli.command("import")
def import_(
    *,
    task: Annotated[str, typer.Argument(help="The task to store it under.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", exists=True, dir_okay=False)],
    form: Annotated[str, typer.Option("--format", help="vpt, spt, cvpt, peft, timm, or auto.")] = "auto",
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file, a class's name a line.")
    ] = None,
    preprocess: Annotated[str, typer.Option(help="JSON: mean, std, interpolation, crop_pct, crop_mode.")] = "{}",
    alias: Annotated[str | None, typer.Option(help="An alias to point at it, such as live.")] = None,
    store: Annotated[str | None, typer.Option(help="Which store (LENSRACK_STORE, else HOME/store).")] = None,
) -> None:
    """Store another tool's checkpoint as a version of a task; prints the version. See docs/howto-import.md."""
    from server.errors import ServiceError
    from server.importing.importer import Wanted

    words = labels.read_text(encoding="utf-8").splitlines() if labels else None
    wanted = Wanted(task, form, words, _object("--preprocess", preprocess))
    try:
        with _backbone_and_store(store) as (backbone, opened), ExitStack() as stack:
            from server.facts import Facts, importer_for
            from server.methods.registry import Registry

            given = [(file.name, stack.enter_context(file.open("rb"))) for file in files]
            bundle = importer_for(Facts.of(backbone), Registry.installed()).bundle(given, wanted, opened)
            opened.put(bundle)
            if alias is not None:
                opened.set_alias(task, alias, bundle.version)
    except (ServiceError, StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was imported: {error}", err=True)
        raise typer.Exit(1) from None
    recipe = bundle.manifest.recipe
    told = f"read as {recipe['imported_from']}, {bundle.manifest.method}; backbone {recipe['backbone']}"
    typer.echo(told, err=True)
    typer.echo(bundle.version)


@cli.command("export")
def export(
    *,
    task: Annotated[str, typer.Argument(metavar="TASK[@ALIAS|@VERSION]", help="The task; without more, what is live.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="onnx: the whole model. timm: a state dict.")],
    takes: Annotated[
        ExportInput, typer.Option("--input", help="onnx: uint8 pictures, or normalised floats.")
    ] = "uint8",
    store: Annotated[str | None, typer.Option(help="Which store (LENSRACK_STORE, else HOME/store).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a task for other tools: an ONNX model, or a timm state dict. See docs/howto-import.md."""
    from server.errors import ServiceError

    try:
        with _backbone_and_store(store) as (backbone, opened):
            from server.exporting.to_onnx import Input, to_onnx
            from server.exporting.to_timm import to_timm
            from server.methods.registry import Registry

            bundle = opened.get(*_version(opened, task))
            registry = Registry.installed()
            registry.check(bundle, backbone.spec)
            whole = to_timm(bundle, backbone) if form == "timm" else to_onnx(bundle, backbone, registry, Input(takes))
        with output.open("wb" if force else "xb") as file:
            file.write(whole)
    except (ServiceError, StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was exported: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {bundle.manifest.task} {bundle.version[:12]}, {bundle.manifest.method}", err=True)


def _version(store: Store, name: str) -> tuple[str, str]:
    """Task and version of `task`, `task@alias` or the beginning of a version. Raises StoreError."""
    task, _, which = name.partition("@")
    aliases = store.aliases(task)
    if (which or "live") in aliases:
        return task, max(aliases[which or "live"].targets, key=lambda target: target.weight).version
    found = [info.version for info in store.versions(task) if which and info.version.startswith(which)]
    if len(found) != 1:
        raise VersionNotFound(task, which or "live")
    return task, found[0]


def _object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text[:100]}", param_hint=option)
    return value


@contextmanager
def _backbone_and_store(url: str | None) -> Iterator[tuple[Any, Store]]:
    """In float32 on the CPU, whatever the server runs in: nothing is lost on the way."""
    settings = load_settings(store=url, device="cpu", dtype="float32", packed=False)
    start_logging(settings)
    from server.facts import load_backbone

    backbone = load_backbone(settings, settings.threads or os.cpu_count() or 1)
    with closing(open_store(settings.store_url)) as store:
        yield backbone, store


stores = typer.Typer(no_args_is_help=True, help="Back a store up, restore it, or move it to another kind of store.")
cli.add_typer(stores, name="store")

StoreUrl = Annotated[str | None, typer.Option("--store", help="Which store (LENSRACK_STORE, else HOME/store).")]


@stores.command("export")
def store_export(
    path: Annotated[Path, typer.Argument(help="A folder, or a file when it ends in .tar.")], store: StoreUrl = None
) -> None:
    """Write a whole store into an archive: bundles, aliases and where these have pointed."""
    from server.store_transfer import export_store

    with _transfer("exported", store) as opened:
        done = export_store(opened, path)
        what = f"exported {done.versions} versions of {done.tasks} tasks"
        typer.echo(f"{what}, {done.written} of them new in the archive")


@stores.command("import")
def store_import(
    path: Annotated[Path, typer.Argument(help="What `store export` wrote.")],
    store: StoreUrl = None,
    overwrite: Annotated[bool, typer.Option(help="Move aliases that point elsewhere in the store.")] = False,
) -> None:
    """Add all of an archive to a store. Nothing is written unless all of it is whole."""
    from server.store_transfer import import_store

    with _transfer("imported", store) as opened:
        done = import_store(opened, path, overwrite=overwrite)
        typer.echo(f"imported {done.versions} versions of {done.tasks} tasks, {done.written} of them new in the store")


@contextmanager
def _transfer(verb: str, url: str | None) -> Iterator[Store]:
    """The store, closed afterwards; a failure is a sentence."""
    settings = load_settings(store=url)
    start_logging(settings)
    try:
        with closing(open_store(settings.store_url)) as store:
            yield store
    except (StoreError, ValueError, OSError) as error:
        typer.echo(f"nothing was {verb} in full: {error}", err=True)
        raise typer.Exit(1) from None


REST = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}  # a command reads its own


@cli.command(context_settings=REST)
def pretrain(context: typer.Context) -> None:
    """Make a backbone like the bundled one: `pretrain --help` tells from what and how."""
    importlib.import_module("server.pretraining.command").main(context.args)


@cli.command(context_settings=REST)
def bench(context: typer.Context) -> None:
    """Measure something: `bench NAME --help` tells what and how."""
    name, *arguments = context.args or ["nothing"]
    if name not in BENCHES:
        typer.echo(f"expected bench {' | '.join(BENCHES)}, got {name[:100]}", err=True)
        raise typer.Exit(2)
    importlib.import_module(f"server.bench.{name.replace('-', '_')}").main(arguments)


if __name__ == "__main__":
    cli()
