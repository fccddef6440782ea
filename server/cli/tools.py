"""`python -m server pretrain | bench`: commands that parse their own options."""

from __future__ import annotations

import importlib

import typer

BENCHES = (
    "accuracy",
    "backbone",
    "compare",
    "decode",
    "engine",
    "epochs",
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

REST = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}  # parsed by the command


def pretrain(context: typer.Context) -> None:
    """Train a backbone like the bundled one; see `pretrain --help`."""
    importlib.import_module("server.pretraining.command").main(context.args)


def bench(context: typer.Context) -> None:
    """Run a benchmark; see `bench NAME --help`."""
    name, *arguments = context.args or ["nothing"]
    if name not in BENCHES:
        typer.echo(f"expected bench {' | '.join(BENCHES)}, got {name[:100]}", err=True)
        raise typer.Exit(2)
    importlib.import_module(f"server.bench.{name.replace('-', '_')}").main(arguments)
