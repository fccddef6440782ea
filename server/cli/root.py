"""What commands have in common: settings as sentences, logs and traces."""

from __future__ import annotations

import atexit
from typing import Any

import typer
from pydantic import ValidationError

from server import __version__
from server.observability import logs, tracing
from server.settings import Settings


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
