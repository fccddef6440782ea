"""Every endpoint once: its request, and the reader of its answer. Both clients call these and nothing else."""

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
LONGEST_WAIT_S = 30.0  # the server holds an event request no longer
UPLOAD_WAIT_S = 600.0  # after the last byte the server still unpacks and looks at every image
_DIGEST = re.compile(wire.VERSION_PATTERN)


# --- predictions ------------------------------------------------------------------------------------------------------


def predict(
    task: str, images: Images, *, top_k: int, key: str | None, geometry: wire.Geometry | None = None
) -> Call[list[Answer]]:
    """With a `geometry` the images are cut here, where that gives the very pixels that the server would make."""

    def read(reply: Reply) -> list[Answer]:
        told = wire.PredictResponse.model_validate_json(reply.content)
        _require_count(len(told.predictions), len(images))
        return [_answer(told.task, told.version, told.versions, of_image) for of_image in told.predictions]

    path, params = f"/predict/{segment(task, 'task')}", [("top_k", str(top_k))]
    return Call("POST", path, read, params, **_asking(images, key, geometry))


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
    return Call("POST", "/predict", _read_many, params, **_asking([image], key, geometry))


def check_map(images: object, in_flight: int, errors: str) -> None:
    """Raises InvalidInput for what would otherwise be taken apart: a path is a sequence of letters."""
    if isinstance(images, str | bytes | os.PathLike):
        raise InvalidInput(f"images: expected several of them, such as a list of paths, got {str(images)[:100]!r}")
    if in_flight < 1 or errors not in ("raise", "return"):
        raise InvalidInput(f"expected in_flight >= 1 and errors raise or return, got {in_flight} and {errors!r}")


def embed(images: Images) -> Call[list[list[float]]]:
    def read(reply: Reply) -> list[list[float]]:
        told = wire.EmbedResponse.model_validate_json(reply.content)
        _require_count(len(told.embeddings), len(images))
        return told.embeddings

    return Call("POST", "/embed", read, **_asking(images, None))


def _asking(images: Images, key: str | None, geometry: wire.Geometry | None = None) -> dict[str, Any]:
    """One image travels as it is, several as a multipart body."""
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
            raise ProtocolError(f"the answer for task {task!r} holds neither predictions nor an error")
    return ManyAnswers(answers, errors)


def _answer(task: str, version: str, versions: Sequence[str] | None, predictions: Sequence[wire.Prediction]) -> Answer:
    if not predictions:
        raise ProtocolError(f"the answer for task {task!r} holds no label")
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
    words = {"labels": list(labels) if labels is not None else None, "preprocess": preprocess}
    payload = {
        "files": [("file", (Path(file).name, Path(file).read_bytes())) for file in files],
        "data": {name: json.dumps(value) for name, value in words.items() if value},
    }
    path = f"{_task(task)}/versions"
    return Call("PUT", path, read_as(wire.VersionInfo), params, payload=payload, transfer=True)


def download_bundle(task: str, version: str) -> Call[bytes]:
    """The version is the file's digest, so what arrives is checked against it."""

    def read(reply: Reply) -> bytes:
        expected = reply.headers.get("lensrack-version", version)
        digest = hashlib.sha256(reply.content).hexdigest()
        if not digest.startswith(version) or (_DIGEST.match(expected) and digest != expected):
            raise ProtocolError(f"the bundle arrived damaged: expected digest {expected}, got {digest}")
        return reply.content

    return Call("GET", f"{_version(task, version)}/bundle", read, transfer=True)


def bundle_bytes(source: str | Path | bytes | IO[bytes]) -> bytes:
    """A bundle's file in memory; it is a megabyte or so. Raises InvalidInput."""
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
    """Sent again under a condition it would fail on its own success, so then it is sent once."""
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
    """A second rollback undoes the first, so it is sent once."""
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
    """The last word about a picture counts, so saying it twice says it once."""
    params = [("label", label), *([("new_label", "true")] if new_label else [])]
    return Call("POST", _feedback(task), read_as(wire.Feedback), params, **_asking(images, None))


def list_feedback(task: str, *, cursor: str | None, limit: int, label: str | None) -> Call[wire.FeedbackPage]:
    given = {"cursor": cursor, "limit": str(limit), "label": label}
    params = [(name, value) for name, value in given.items() if value is not None]
    return Call("GET", _feedback(task), read_as(wire.FeedbackPage), params)


def delete_feedback(task: str, sha256: str) -> Call[None]:
    return Call("DELETE", f"{_feedback(task)}/{segment(sha256, 'sha256')}", read_nothing)


def freeze_feedback(task: str, *, name: str | None, parent: str | None) -> Call[wire.Dataset]:
    params = [(key, value) for key, value in (("name", name), ("parent", parent)) if value is not None]
    return Call("POST", f"{_feedback(task)}/dataset", read_as(wire.Dataset), params, wait_s=UPLOAD_WAIT_S)


# --- datasets ---------------------------------------------------------------------------------------------------------


def upload_dataset(
    archive: Archive, *, name: str | None, parent: str | None, progress: Progress | None
) -> Call[wire.Dataset]:
    """Datasets are known by their content, so that sending one twice stores it once; a pipe cannot be sent twice."""
    headers = {"Content-Type": archive.content_type}
    headers |= {"Transfer-Encoding": "chunked"} if archive.size is None else {"Content-Length": str(archive.size)}
    return Call(
        "POST",
        "/datasets",
        lambda reply: archive.complete(read_as(wire.Dataset)(reply)),
        [(key, value) for key, value in (("name", name), ("parent", parent)) if value is not None],
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
    """The key is made here, once, so that a request that is sent again cannot start a second job."""
    given = _checked(wire.Recipe, **recipe) if isinstance(recipe, Mapping) else recipe
    asked = {"task": task, "dataset": dataset, "method": method, "recipe": given}
    body = _json(_checked(wire.TrainRequest, **asked, publish=publish, priority=priority))
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
    """As `train`, the key is made here, once."""
    if isinstance(methods, str):
        raise InvalidInput(f"methods: expected a list of method names, got {methods!r}")
    given = _checked(wire.ComparedRecipe, **(recipe or {})) if not isinstance(recipe, wire.ComparedRecipe) else recipe
    asked: dict[str, Any] = {"task": task, "dataset": dataset, "seeds": list(seeds), "recipe": given}
    if methods is not None:
        asked["methods"] = list(methods)
    body = _json(_checked(wire.CompareRequest, **asked, priority=priority))
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
    """A job that begins with a version instead of a fit."""
    shares = None if keep is None else list(keep)
    how = _checked(wire.Condense, version=version, keep=shares, epsilon=epsilon, epochs=epochs)
    recipe = wire.Recipe(condense=how)
    return train(task, dataset, method="auto", recipe=recipe, publish=publish, priority=priority, key=key)


def list_jobs(*, cursor: str | None, limit: int, task: str | None, state: wire.JobState | None) -> Call[wire.JobList]:
    given = {"cursor": cursor, "limit": str(limit), "task": task, "state": state}
    params = [(name, value) for name, value in given.items() if value is not None]
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
    """One step of a path, quoted. An empty one or dots would make a request for something else altogether."""
    if value in {"", ".", ".."}:
        raise InvalidInput(f"{what}: expected a name, got {value!r}")
    return quote(value, safe="@")


def _checked(model: type[R], **fields: Any) -> R:
    try:
        return model(**fields)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in found["loc"])
        raise InvalidInput(f"{where}: {found['msg']}, got {found['input']!r}") from error


def _json(body: wire.Request) -> dict[str, Any]:
    return {"json": body.model_dump(exclude_none=True)}
