"""The generated pages of docs/reference. They are committed, so that they can be read without a build;
tests/docs/test_reference.py compares them with the output of this module."""

from __future__ import annotations

from docs.generator import commands, http, picture, sdk, tables

NOTE = "<!-- Made by `make reference` from the code; not written by hand. -->\n\n"


def pages() -> dict[str, str]:
    """Return the text of every generated file by its path below docs."""
    schema = http.schema()
    written = {
        "settings": tables.settings(),
        "errors": tables.errors(),
        "metrics": tables.metrics(),
        "cli": commands.client(),
        "server-cli": commands.server(),
        "http": http.page(schema),
        "sdk": sdk.page(),
    }
    return {
        **{f"reference/{name}.md": NOTE + text for name, text in written.items()},
        "reference/openapi.json": http.text(schema),
        "explanation/prefix.svg": picture.prefix(),
    }
