"""Shared by all commands: settings with readable errors, logs and traces."""

from __future__ import annotations

import atexit
from typing import Any

import typer
from pydantic import ValidationError

from server import __version__
from server.observability import logs, tracing
from server.settings import Settings, unknown_variables


def load_settings(*, warn: bool = True, **overrides: Any) -> Settings:
    """The environment's settings, overridden by the command line's. Prints an invalid one and exits with 2; warns of
    variables that are no settings, with `warn`."""
    for warning in unknown_variables() if warn else ():
        typer.echo(f"warning: {warning}", err=True)
    try:
        return Settings(**{key: value for key, value in overrides.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            typer.echo(f"LENSRACK_{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}", err=True)
        raise typer.Exit(2) from None


def start_logging(settings: Settings) -> None:
    logs.start(settings.log_level, settings.log_format)


def start_observability(settings: Settings, service: str) -> None:
    """Start logs, and traces under this `service` name if they are enabled."""
    start_logging(settings)
    require_tracing(settings)
    if settings.otlp_endpoint:
        tracing.start(settings.otlp_endpoint, service=service, version=__version__, ratio=settings.trace_ratio)
        atexit.register(tracing.stop)  # sends pending spans


def require_tracing(settings: Settings) -> None:
    """Exit with 2 and a message if traces are enabled but their packages are not installed."""
    try:
        if settings.otlp_endpoint:
            tracing.require()
    except tracing.NotInstalled as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
