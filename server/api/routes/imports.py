"""Other tools' checkpoints in the body of an upload: one file as it is, or a form with several.

file         a file of the checkpoint, repeatable: a head, or PEFT's configuration, may come by itself
labels       JSON, the classes' names in their order
preprocess   JSON, any of mean, std, interpolation, crop_pct, crop_mode
"""

from __future__ import annotations

import io
import json
from typing import Any, Final

from fastapi import Request

from lensrack import wire
from server.api import forms, params
from server.errors import BadRequest, Unprocessable
from server.importing.checkpoint import MAX_FILES
from server.importing.importer import File, ImportOptions

WORDS: Final = ("labels", "preprocess")


async def read(request: Request, task: str, form: wire.ImportFormat) -> tuple[list[File], ImportOptions]:
    """Return the files and the options of an import. Raises BadRequest, Unprocessable."""
    body = await request.body()
    if params.media_type(request.headers) != forms.FORM:
        return [("checkpoint", io.BytesIO(body))], ImportOptions(task, form)
    parts = forms.read(body, request.headers["content-type"], most=MAX_FILES + len(WORDS))
    files: list[File] = []
    words: dict[str, Any] = {}
    for part in parts:
        if part.name in WORDS and part.name not in words and part.text is not None:
            words[part.name] = _json(part.name, part.text)
        elif part.is_file and part.name not in WORDS:
            files.append((part.filename or "", io.BytesIO(part.data)))
        else:
            expected = "files in the field 'file', and 'labels' and 'preprocess' once as text"
            raise Unprocessable(f"multipart body: expected {expected}, got {part.name[:100]!r}")
    if len(files) > MAX_FILES:
        raise BadRequest(f"multipart body: expected at most {MAX_FILES} files, got {len(files)}")
    return files, ImportOptions(task, form, words.get("labels"), words.get("preprocess", {}))


def _json(name: str, text: str) -> Any:
    """Return `labels` as a list, `preprocess` as an object; their contents are checked with the manifest."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unprocessable(f"{name}: expected JSON, got something else") from error
    if not isinstance(value, list if name == "labels" else dict):
        raise Unprocessable(f"{name}: expected {'a list' if name == 'labels' else 'an object'}, got another value")
    return value
