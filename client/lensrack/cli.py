"""`lensrack`: the command line of the SDK.

Results go to stdout, progress and errors to stderr; with --json, before or after the command, results are JSON.
Exit codes:
    0    success
    1    failure: the server answered with an error, a job failed, or an image got no answer
    2    the command is invalid; nothing was sent
    3    the server is unreachable, busy or too slow; the same command may succeed later
    130  interrupted
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import Client, LensrackError, __version__, _hints
from . import _terminal as term
from .commands import bundles, datasets, predicting, tasks, training
from .commands.session import Context, Json, Session, client_of, wants_json


class Commands(TyperGroup):
    """The commands; an error about a task that does not exist gets the name of the nearest."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except LensrackError as error:
            if context.obj is not None:
                _hints.note_nearest_task(error, context.obj.client)
            raise


app = typer.Typer(
    name="lensrack", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main() -> None:
    """Run the console script; an error ends it with one line on stderr."""
    try:
        app()
    except (LensrackError, OSError) as error:
        term.print_error(error)
        sys.exit(term.exit_code(error))


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def session(
    context: Context,
    url: Annotated[str | None, typer.Option(envvar="LENSRACK_URL", help="The server's URL.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LENSRACK_API_KEY", help="The server's API key.")] = None,
    as_json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train, publish and serve many vision tasks from one frozen backbone.

    Exit codes: 0 success; 1 failure; 2 the command is invalid, nothing was sent; 3 the server is unreachable, busy or
    too slow, try again later; 130 interrupted.
    """
    for warning in _hints.misspelt_variables():
        term.say(f"warning: {warning}")
    client = Client(url, api_key)
    context.call_on_close(client.close)
    context.obj = Session(client, as_json)


@app.command()
def health(context: Context, as_json: Json = False) -> None:
    """Show whether the server is ready.

    Exit code 1 if it is not.
    """
    alive, ready = client_of(context).health(), client_of(context).ready()
    if wants_json(context, as_json):
        term.print_json(ready)
    else:
        info = ready.backbone
        backbone = info and f"{info.arch} ({'trained' if info.trained else 'untrained'}) on {info.device}, {info.dtype}"
        head: dict[str, object] = {"server": alive.version, "ready": ready.ready, "backbone": backbone}
        term.print_fields({**head, **ready.checks, **{f"note {i}": note for i, note in enumerate(ready.notes, 1)}})
    raise typer.Exit(0 if ready.ready else 1)


for group in (tasks, bundles, datasets, training, predicting):
    app.add_typer(group.commands)
app.add_typer(tasks.tasks, name="tasks")
app.add_typer(bundles.bundles, name="bundle")
app.add_typer(datasets.datasets, name="datasets")
app.add_typer(training.jobs, name="jobs")


if __name__ == "__main__":
    main()
