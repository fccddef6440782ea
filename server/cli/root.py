"""Shared by all commands: settings with readable errors, logs and traces."""

from __future__ import annotations

import atexit
import difflib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import typer
from pydantic import ValidationError

from prompts_store import StoreError
from server import __version__
from server.errors import ServiceError
from server.observability import logs, tracing
from server.processes import INTERRUPTED
from server.settings import Settings

log = logging.getLogger("server")

PREFIX: Final = "LENSRACK_"
# Variables that are no settings: the client's, those of the tests, and what Kubernetes tells of a service `lensrack`.
_OTHERS: Final = re.compile(r"API_KEY|URL|TIMEOUT|RETRIES|FUZZ|(.*_)?SERVICE_(HOST|PORT.*)|(.*_)?PORT_\d+_(TCP|UDP).*")


def load_settings(**overrides: Any) -> Settings:
    """The environment's settings, overridden by the command line's. Prints an invalid one and exits with 2."""
    try:
        return Settings(**{key: value for key, value in overrides.items() if value is not None})
    except ValidationError as error:
        for problem in error.errors():
            name = f"{PREFIX}{'_'.join(map(str, problem['loc'])).upper()}"
            expected = problem["msg"].replace("Input should be", "expected")
            typer.echo(f"{name}: {expected}, got {str(problem['input'])[:80]!r}", err=True)
        raise typer.Exit(2) from None


def report_unknown_variables() -> None:
    """Print each variable LENSRACK_… that is no setting, with the settings of the nearest names."""
    known = {name.upper() for name in Settings.model_fields}
    for variable, value in sorted(os.environ.items()):
        name = variable.removeprefix(PREFIX)
        if name == variable or name.upper() in known or _OTHERS.fullmatch(name) or value.startswith("tcp://"):
            continue
        nearest = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f", did you mean {PREFIX}{nearest[0]}?" if nearest else ""
        typer.echo(f"{variable}: no setting has this name, and it has no effect{hint}", err=True)


@contextmanager
def starting(program: str) -> Iterator[None]:
    """End the `program` ("server") with a sentence where what it needs cannot be used, or where Ctrl-C ends it."""
    try:
        yield
    except (StoreError, ServiceError, ValueError, OSError) as error:  # BackboneError is a ValueError
        typer.echo(f"the {program} cannot start: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise typer.Exit(INTERRUPTED) from None


def log_end(status: int) -> None:
    """Log that a program has ended because it was asked to."""
    if status in (0, INTERRUPTED):
        log.info("stopped")


def start_logging(settings: Settings) -> None:
    logs.start(settings.log_level, settings.log_format, requests=settings.log_requests)


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
