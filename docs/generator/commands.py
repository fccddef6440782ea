"""The two command lines: every command with its arguments and options, read from the typer apps."""

from __future__ import annotations

from typing import Any

import typer

from docs.generator.markdown import table
from lensrack import cli as client_cli
from server import __main__ as server_cli

CLIENT_HEAD = """# The command line

`pip install lensrack` installs `lensrack`. Answers are written to standard output, progress and errors to
standard error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed: the server refused the request or failed, a job failed, or an image got no answer |
| 2 | the command is wrong; nothing was sent |
| 3 | no answer: the server is away, busy or too slow; the same command may work later |
| 130 | interrupted |

`lensrack --install-completion` installs completion of commands, options and names of tasks, data sets and jobs
for bash, zsh, fish or PowerShell.
"""
SERVER_HEAD = """# The server's command line

`python -m server COMMAND` runs from a checkout or in the image.
"""
HIDDEN = {"--install-completion", "--show-completion", "--help"}


def client() -> str:
    return CLIENT_HEAD + _options(typer.main.get_command(client_cli.app)) + _all(client_cli.app, "lensrack")


def server() -> str:
    return SERVER_HEAD + _all(server_cli.cli, "python -m server")


def _all(app: typer.Typer, name: str) -> str:
    return "".join(_command(command, words) for words, command in _under(typer.main.get_command(app), name))


def _under(group: Any, words: str) -> list[tuple[str, Any]]:
    commands: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        full = f"{words} {name}"
        commands += _under(command, full) if hasattr(command, "commands") else [(full, command)]
    return commands


def _command(command: Any, words: str) -> str:
    arguments = [_name(param) for param in command.params if param.param_type_name == "argument"]
    usage = " ".join([words, *arguments])
    return f"\n## {words}\n\n```text\n{usage} [OPTIONS]\n```\n\n{_help(command)}{_options(command)}"


def _help(command: Any) -> str:
    """Return the help text without typer's form feeds; paragraphs are kept."""
    paragraphs = (command.help or "").replace("\f", "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) + "\n"


def _name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _options(command: Any) -> str:
    rows = []
    for param in command.params:
        if param.param_type_name == "argument" or HIDDEN & set(param.opts):
            continue
        names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
        rows.append((names, _default(param), param.help or ""))
    return "\n" + table(("option", "default", "meaning"), rows) if rows else ""


def _default(option: Any) -> str:
    value = option.default
    if option.required:
        return "required"
    return "" if value is None or value is False or callable(value) or value == () else f"`{value}`"
