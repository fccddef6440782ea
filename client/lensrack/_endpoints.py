"""One function for each endpoint: it returns the request and the reader of the response. Both clients use these."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from . import _images, _resizing, wire
from ._archive import Archive, Progress
from ._core import Call, Reply, read_as, read_nothing
from ._images import ImageInput
from .answers import Answer, ManyAnswers
from .errors import ApiError, InvalidInput, ProtocolError

R = TypeVar("R", bound=wire.Request)

Images = list[Any] | tuple[Any, ...]
MAX_IMAGES = 64  # of one request, as the server has it by default
LONGEST_WAIT_S = 30.0  # the longest that the server holds a request for events
EXPORT_WAIT_S = 600.0  # before the first byte the server loads the backbone and traces the model
UPLOAD_WAIT_S = 600.0  # after the last byte the server still unpacks and decodes every image
_DIGEST = re.compile(wire.VERSION_PATTERN)


# --- predictions ------------------------------------------------------------------------------------------------------


def predict(
    task: str, images: Images, *, top_k: int, key: str | None, geometry: wire.Geometry | None = None
) -> Call[list[Answer]]:
    """With a `geometry`, images are resized here if that gives exactly the pixels that the server would compute."""

    def read(reply: Reply) -> list[Answer]:
        body = wire.PredictResponse.model_validate_json(reply.content)
        _require_count(len(body.predictions), len(images))
        return [_answer(body.task, body.version, body.versions, labels) for labels in body.predictions]

    path, params = f"/predict/{segment(task, 'task')}", [("top_k", str(top_k))]
    return Call("POST", path, read, params, **_image_request(images, key, geometry))


def predict_many(
    tasks: Sequence[str],
    image: ImageInput,
    *,
    top_k: int,
    key: str | None,
    geometry: wire.Geometry | None = None,
) -> Call[ManyAnswers]:
    if isinstance(tasks, str) or not tasks:
        raise InvalidInput(f"tasks: expected a list of task names, got {tasks!r}")
    params = [*(("task", task) for task in tasks), ("top_k", str(top_k))]
    return Call("POST", "/predict", _read_many, params, **_image_request([image], key, geometry))


def parts(images: Images) -> list[Images]:
    """Return images as they are sent, at most MAX_IMAGES in each request."""
    return [images[start : start + MAX_IMAGES] for start in range(0, len(images), MAX_IMAGES)] or [images]


def check_map(images: object, in_flight: int, errors: str) -> None:
    """Raise InvalidInput for wrong arguments of `map`, such as a single path, whose characters would be iterated."""
    if isinstance(images, str | bytes | os.PathLike):
        raise InvalidInput(f"images: expected an iterable such as a list of paths, got {str(images)[:100]!r}")
    if in_flight < 1 or errors not in ("raise", "return"):
        raise InvalidInput(f"expected in_flight >= 1 and errors raise or return, got {in_flight} and {errors!r}")


def embed(images: Images) -> Call[list[list[float]]]:
    def read(reply: Reply) -> list[list[float]]:
        body = wire.EmbedResponse.model_validate_json(reply.content)
        _require_count(len(body.embeddings), len(images))
        return body.embeddings

    return Call("POST", "/embed", read, **_image_request(images, None))


def _image_request(images: Images, key: str | None, geometry: wire.Geometry | None = None) -> dict[str, Any]:
    """Return the headers and the body of a request: the bytes of one image, or a multipart body of several."""
    if not images:
        raise InvalidInput("images: expected at least one image, got none")
    encoded = [_images.encode(image) if geometry is None else _resizing.encode(image, geometry) for image in images]
    headers = {"Lensrack-Key": key} if key is not None else {}
    if geometry is not None:
        headers[wire.GEOMETRY_HEADER] = geometry.header
    if len(encoded) == 1:
        data, kind = encoded[0]
        return {"headers": {**headers, "Content-Type": kind}, "payload": {"content": data}}
    files = [("images", (f"image-{index}", data, kind)) for index, (data, kind) in enumerate(encoded)]
    return {"headers": headers, "payload": {"files": files}}


def _read_many(reply: Reply) -> ManyAnswers:
    answers: dict[str, Answer] = {}
    errors: dict[str, ApiError] = {}
    for task, result in wire.ManyPredictResponse.model_validate_json(reply.content).results.items():
        if result.error is not None:
            errors[task] = ApiError.of(result.error)
        elif result.version is not None and result.predictions:
            name = task.partition("@")[0]
            answers[task] = _answer(name, result.version, result.versions, result.predictions[0])
        else:
            raise ProtocolError(f"the answer for task {task!r} has neither predictions nor an error")
    return ManyAnswers(answers, errors)


def _answer(task: str, version: str, versions: Sequence[str] | None, predictions: Sequence[wire.Prediction]) -> Answer:
    if not predictions:
        raise ProtocolError(f"the answer for task {task!r} has no label")
    return Answer(task, version, tuple(predictions), tuple(versions or (version,)))


def _require_count(got: int, expected: int) -> None:
    if got != expected:
        raise ProtocolError(f"expected answers for {expected} images, got {got}")


# --- tasks, versions, aliases -----------------------------------------------------------------------------------------


def list_tasks() -> Call[list[wire.Task]]:
    return Call("GET", "/tasks", lambda reply: read_as(wire.TaskList)(reply).tasks)


def get_task(task: str) -> Call[wire.Task]:
    return Call("GET", _task(task), read_as(wire.Task))


def delete_task(task: str) -> Call[None]:
    return Call("DELETE", _task(task), read_nothing)


def list_versions(task: str) -> Call[list[wire.VersionInfo]]:
    return Call("GET", f"{_task(task)}/versions", lambda reply: read_as(wire.VersionList)(reply).versions)


def get_version(task: str, version: str) -> Call[wire.VersionInfo]:
    return Call("GET", _version(task, version), read_as(wire.VersionInfo))


def delete_version(task: str, version: str) -> Call[None]:
    return Call("DELETE", _version(task, version), read_nothing)


def upload_version(task: str, bundle: bytes, *, alias: str | None) -> Call[wire.VersionInfo]:
    params = [("alias", alias)] if alias is not None else []
    headers = {"Content-Type": "application/octet-stream"}
    path, payload = f"{_task(task)}/versions", {"content": bundle}
    return Call("PUT", path, read_as(wire.VersionInfo), params, headers, payload, transfer=True)


def import_version(
    task: str,
    files: Sequence[str | Path],
    *,
    form: wire.ImportFormat,
    labels: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
    alias: str | None,
) -> Call[wire.VersionInfo]:
    if not files:
        raise InvalidInput("expected one file or more, got none")
    params = [("format", form), *([("alias", alias)] if alias is not None else [])]
    fields = {"labels": list(labels) if labels is not None else None, "preprocess": preprocess}
    payload = {
        "files": [("file", (Path(file).name, Path(file).read_bytes())) for file in files],
        "data": {name: json.dumps(value) for name, value in fields.items() if value},
    }
    path = f"{_task(task)}/versions"
    return Call("PUT", path, read_as(wire.VersionInfo), params, payload=payload, transfer=True)


def download_bundle(task: str, version: str) -> Call[bytes]:
    """The version is the file's digest, so the received bytes are checked against it."""

    def read(reply: Reply) -> bytes:
        expected = reply.headers.get("lensrack-version", version)
        digest = hashlib.sha256(reply.content).hexdigest()
        if not digest.startswith(version) or (_DIGEST.match(expected) and digest != expected):
            raise ProtocolError(f"the bundle arrived damaged: expected digest {expected}, got {digest}")
        return reply.content

    return Call("GET", f"{_version(task, version)}/bundle", read, transfer=True)


def live_version(task: wire.Task) -> str:
    """Return a task's live version. Raises InvalidInput if it has none."""
    if task.live is None:
        raise InvalidInput(f"task {task.task} has no live version: name one of its versions")
    return task.live


def export_version(task: str, version: str, *, form: wire.ExportFormat, takes: wire.ExportInput) -> Call[bytes]:
    params, path = [("format", form), ("input", takes)], f"{_version(task, version)}/export"
    return Call("GET", path, lambda reply: reply.content, params, wait_s=EXPORT_WAIT_S, transfer=True)


def bundle_bytes(source: str | Path | bytes | IO[bytes]) -> bytes:
    """Read a bundle's file, about a megabyte. Raises InvalidInput."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        return source.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read the bundle {source}: {error.strerror or error}") from error


def get_alias(task: str, alias: str) -> Call[wire.Alias]:
    return Call("GET", _alias(task, alias), read_as(wire.Alias))


def set_alias(task: str, alias: str, version: str, *, weight: float, if_match: str | None) -> Call[wire.Alias]:
    """With `if_match` it is sent once: a retry after success would fail its own condition."""
    update = _checked(wire.AliasUpdate, version=version, weight=weight)
    headers = {"If-Match": if_match} if if_match is not None else {}
    return Call(
        "PUT",
        _alias(task, alias),
        read_as(wire.Alias),
        headers=headers,
        payload=_json(update),
        repeatable=if_match is None,
    )


def delete_alias(task: str, alias: str) -> Call[None]:
    return Call("DELETE", _alias(task, alias), read_nothing)


def alias_history(task: str, alias: str) -> Call[list[wire.AliasChange]]:
    return Call("GET", f"{_alias(task, alias)}/history", lambda reply: read_as(wire.AliasHistory)(reply).changes)


def rollback(task: str, alias: str) -> Call[wire.Alias]:
    """It is sent once, because a second rollback undoes the first."""
    body = _json(_checked(wire.RollbackRequest, alias=alias))
    return Call("POST", f"{_task(task)}/rollback", read_as(wire.Alias), payload=body, repeatable=False)


def load(task: str) -> Call[wire.Residency]:
    return Call("POST", f"{_task(task)}/load", read_as(wire.Residency))


def unload(task: str) -> Call[wire.Residency]:
    return Call("POST", f"{_task(task)}/unload", read_as(wire.Residency))


def pin(task: str, *, pinned: bool) -> Call[wire.Residency]:
    body = _json(wire.PinRequest(pinned=pinned))
    return Call("POST", f"{_task(task)}/pin", read_as(wire.Residency), payload=body)


# --- feedback ---------------------------------------------------------------------------------------------------------


def feedback(task: str, images: Images, label: str, *, new_label: bool) -> Call[wire.Feedback]:
    """The latest label of a picture counts, so a retry changes nothing."""
    params = [("label", label), *([("new_label", "true")] if new_label else [])]
    return Call("POST", _feedback(task), read_as(wire.Feedback), params, **_image_request(images, None))


def list_feedback(task: str, *, cursor: str | None, limit: int, label: str | None) -> Call[wire.FeedbackPage]:
    query = {"cursor": cursor, "limit": str(limit), "label": label}
    params = [(name, value) for name, value in query.items() if value is not None]
    return Call("GET", _feedback(task), read_as(wire.FeedbackPage), params)


def delete_feedback(task: str, sha256: str) -> Call[None]:
    return Call("DELETE", f"{_feedback(task)}/{segment(sha256, 'sha256')}", read_nothing)


def freeze_feedback(task: str, *, name: str | None, parent: str | None) -> Call[wire.Dataset]:
    params = [(key, value) for key, value in (("name", name), ("parent", parent)) if value is not None]
    return Call("POST", f"{_feedback(task)}/dataset", read_as(wire.Dataset), params, wait_s=UPLOAD_WAIT_S)


# --- datasets ---------------------------------------------------------------------------------------------------------


def upload_dataset(
    archive: Archive, *, name: str | None, parent: str | None, label_column: str | None, progress: Progress | None
) -> Call[wire.Dataset]:
    """A dataset's id is its content digest, so a retry stores it once; a pipe cannot be sent twice."""
    headers = {"Content-Type": archive.content_type}
    headers |= {"Transfer-Encoding": "chunked"} if archive.size is None else {"Content-Length": str(archive.size)}
    query = {"name": name, "parent": parent, "label_column": label_column}
    return Call(
        "POST",
        "/datasets",
        lambda reply: archive.complete(read_as(wire.Dataset)(reply)),
        [(key, value) for key, value in query.items() if value is not None],
        headers,
        {"stream": archive.body(progress)},
        max_retries=0 if archive.size is None else None,
        wait_s=UPLOAD_WAIT_S,
        transfer=True,
    )


def list_datasets() -> Call[list[wire.Dataset]]:
    return Call("GET", "/datasets", lambda reply: read_as(wire.DatasetList)(reply).datasets)


def get_dataset(dataset: str) -> Call[wire.Dataset]:
    return Call("GET", _dataset(dataset), read_as(wire.Dataset))


def delete_dataset(dataset: str) -> Call[None]:
    return Call("DELETE", _dataset(dataset), read_nothing)


# --- jobs -------------------------------------------------------------------------------------------------------------


def train(
    task: str,
    dataset: str | None,
    *,
    method: str,
    recipe: Mapping[str, Any] | wire.Recipe | str,
    publish: str,
    priority: int,
    key: str | None,
) -> Call[wire.Job]:
    """The idempotency key is drawn here, once, so that a retried request cannot start a second job."""
    checked = _checked(wire.Recipe, **recipe) if isinstance(recipe, Mapping) else recipe
    fields = {"task": task, "dataset": dataset, "method": method, "recipe": checked}
    body = _json(_checked(wire.TrainRequest, **fields, publish=publish, priority=priority))
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call("POST", "/train", read_as(wire.Job), headers=headers, payload=body)


def compare(
    task: str,
    dataset: str,
    *,
    methods: Sequence[str] | None,
    seeds: Sequence[int],
    recipe: Mapping[str, Any] | wire.ComparedRecipe | None,
    priority: int,
    key: str | None,
) -> Call[wire.Job]:
    """As in `train`, the idempotency key is drawn once."""
    if isinstance(methods, str):
        raise InvalidInput(f"methods: expected a list of method names, got {methods!r}")
    checked = recipe if isinstance(recipe, wire.ComparedRecipe) else _checked(wire.ComparedRecipe, **(recipe or {}))
    fields: dict[str, Any] = {"task": task, "dataset": dataset, "seeds": list(seeds), "recipe": checked}
    if methods is not None:
        fields["methods"] = list(methods)
    body = _json(_checked(wire.CompareRequest, **fields, priority=priority))
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call("POST", "/compare", read_as(wire.Job), headers=headers, payload=body)


def comparison(job: str) -> Call[wire.Comparison]:
    return Call("GET", f"/compare/{segment(job, 'job')}", read_as(wire.Comparison))


def condense(
    task: str,
    *,
    version: str,
    dataset: str | None,
    keep: Sequence[float] | None,
    epsilon: float | None,
    epochs: int | None,
    publish: str,
    priority: int,
    key: str | None,
) -> Call[wire.Job]:
    """A training job whose recipe condenses an existing version."""
    shares = None if keep is None else list(keep)
    recipe = wire.Recipe(condense=_checked(wire.Condense, version=version, keep=shares, epsilon=epsilon, epochs=epochs))
    return train(task, dataset, method="auto", recipe=recipe, publish=publish, priority=priority, key=key)


def list_jobs(*, cursor: str | None, limit: int, task: str | None, state: wire.JobState | None) -> Call[wire.JobList]:
    query = {"cursor": cursor, "limit": str(limit), "task": task, "state": state}
    params = [(name, value) for name, value in query.items() if value is not None]
    return Call("GET", "/train", read_as(wire.JobList), params)


def get_job(job: str) -> Call[wire.Job]:
    return Call("GET", _job(job), read_as(wire.Job))


def cancel_job(job: str) -> Call[wire.Job]:
    return Call("POST", f"{_job(job)}/cancel", read_as(wire.Job))


def job_events(job: str, *, after: int, wait_s: float, limit_s: float | None = None) -> Call[wire.JobEvents]:
    wait_s = min(max(wait_s, 0.0), LONGEST_WAIT_S)
    params = [("after", str(after)), ("wait_s", f"{wait_s:g}")]
    return Call("GET", f"{_job(job)}/events", read_as(wire.JobEvents), params, wait_s=wait_s, limit_s=limit_s)


# --- health -----------------------------------------------------------------------------------------------------------


def health() -> Call[wire.Health]:
    return Call("GET", "/healthz", read_as(wire.Health))


def ready() -> Call[wire.Ready]:
    return Call("GET", "/readyz", read_as(wire.Ready), max_retries=0)


# --- paths and bodies -------------------------------------------------------------------------------------------------


def _task(task: str) -> str:
    return f"/tasks/{segment(task, 'task')}"


def _version(task: str, version: str) -> str:
    return f"{_task(task)}/versions/{segment(version, 'version')}"


def _alias(task: str, alias: str) -> str:
    return f"{_task(task)}/aliases/{segment(alias, 'alias')}"


def _feedback(task: str) -> str:
    return f"{_task(task)}/feedback"


def _dataset(dataset: str) -> str:
    return f"/datasets/{segment(dataset, 'dataset')}"


def _job(job: str) -> str:
    return f"/train/{segment(job, 'job')}"


def segment(value: str, what: str) -> str:
    """Quote a name as one segment of a path. Raises InvalidInput for names that would address another resource."""
    if value in {"", ".", ".."}:
        raise InvalidInput(f"{what}: expected a name, got {value!r}")
    return quote(value, safe="@")


def _checked(model: type[R], **fields: Any) -> R:
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{where}: {first['msg']}, got {first['input']!r}") from error


def _json(body: wire.Request) -> dict[str, Any]:
    return {"json": body.model_dump(exclude_none=True)}
