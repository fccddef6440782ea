"""`python -m server pretrain | bench`: each reads its own options."""

from __future__ import annotations

import importlib

import typer

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

REST = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}  # a command reads its own


def pretrain(context: typer.Context) -> None:
    """Make a backbone like the bundled one: `pretrain --help` tells from what and how."""
    importlib.import_module("server.pretraining.command").main(context.args)


def bench(context: typer.Context) -> None:
    """Measure something: `bench NAME --help` tells what and how."""
    name, *arguments = context.args or ["nothing"]
    if name not in BENCHES:
        typer.echo(f"expected bench {' | '.join(BENCHES)}, got {name[:100]}", err=True)
        raise typer.Exit(2)
    importlib.import_module(f"server.bench.{name.replace('-', '_')}").main(arguments)
