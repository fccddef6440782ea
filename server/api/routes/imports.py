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
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from lensrack import wire
from server.api import params
from server.errors import BadRequest, Unprocessable
from server.importing.checkpoint import MAX_FILES
from server.importing.importer import File, ImportOptions

from .predict import require_whole

FORM: Final = "multipart/form-data"
WORDS: Final = ("labels", "preprocess")
MAX_WORDS_BYTES: Final = 4 * 2**20  # ten thousand labels of 200 characters


async def read(request: Request, task: str, form: wire.ImportFormat) -> tuple[list[File], ImportOptions]:
    """Return the files and the options of an import. Raises BadRequest, Unprocessable."""
    body = await request.body()
    if params.media_type(request.headers) != FORM:
        return [("checkpoint", io.BytesIO(body))], ImportOptions(task, form)
    require_whole(body, request.headers.get("content-type", ""))
    files: list[File] = []
    words: dict[str, Any] = {}
    try:
        async with request.form(max_files=MAX_FILES, max_fields=len(WORDS), max_part_size=MAX_WORDS_BYTES) as parts:
            for name, value in parts.multi_items():
                if name == "file" and isinstance(value, UploadFile):
                    files.append((value.filename or "", io.BytesIO(await value.read())))
                elif name in WORDS and isinstance(value, str) and name not in words:
                    words[name] = _json(name, value)
                else:
                    expected = "files in the field 'file', and 'labels' and 'preprocess' once as text"
                    raise Unprocessable(f"multipart body: expected {expected}, got {name[:100]!r}")
    except HTTPException as error:
        raise BadRequest(f"multipart body: {error.detail}") from error
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
